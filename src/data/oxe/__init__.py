"""The Open X-Embodiment sets: what they hold, their standardisation, and mixtures of them."""

from __future__ import annotations

from pizero.data.oxe.mixes import MIXES, mix_weights, oxe_dataset, oxe_mix
from pizero.data.oxe.registry import OXE_SETS, Action, OxeSet, State, oxe_rule, oxe_set

__all__ = [
    "MIXES",
    "OXE_SETS",
    "Action",
    "OxeSet",
    "State",
    "mix_weights",
    "oxe_dataset",
    "oxe_mix",
    "oxe_rule",
    "oxe_set",
]
