"""What a check of a data set says, and the words that checks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pizero.agent.report.dataset_look import Look
from pizero.agent.report.dataset_pictures import Probes
from pizero.data.dataset import EpisodeDataset
from pizero.data.stats import Statistics

NEARLY_CONSTANT = 1e-4  # as Normalizer's min_scale


@dataclass(frozen=True)
class Finding:
    """Something to look at. `level` is "bad" (it will hurt training) or "note"."""

    level: str
    title: str
    detail: str


@dataclass(frozen=True)
class Inspected:
    """What checks are made on."""

    look: Look
    probes: Probes

    @property
    def data(self) -> EpisodeDataset:
        """The data set."""
        return self.look.source.dataset


def constant_dimensions(statistics: Statistics) -> dict[int, str]:
    """Dimension -> in which way it hardly changes: constant, nearly constant, or q01 = q99."""
    found = {}
    spread = np.asarray(statistics.max) - np.asarray(statistics.min)
    inner = np.asarray(statistics.q99) - np.asarray(statistics.q01)
    deviation = np.asarray(statistics.std)
    for i in range(statistics.size):
        if spread[i] == 0:
            found[i] = "constant"
        elif spread[i] < NEARLY_CONSTANT or deviation[i] < NEARLY_CONSTANT:
            found[i] = "nearly constant"
        elif inner[i] < NEARLY_CONSTANT:
            found[i] = "q01 = q99"
    return found


def counted(count: int, what: str) -> str:
    """A number and its noun."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def listed(names: Sequence[str], *, most: int = 8) -> str:
    """Names as people write them."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return ", ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + shown[-1] if shown else ""


def percent(share: float) -> str:
    """A share, with a decimal where it is small."""
    share = float(share)
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"
