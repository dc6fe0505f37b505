"""LoRA leaves, merged into the weights they belong to.

openpi's trees have `lora_a`, `lora_b` beside a base leaf `w` (attention), or `_lora_a`, `_lora_b`
behind its name (feed-forward). The delta is A B for every head; for the output projection openpi
sums the rank label over heads, so every head's A meets the sum of all B. Attention's delta is
scaled by alpha / rank, which no leaf tells and which is 1 in all published variants; the
feed-forward's is never scaled. open-pi-zero's layers have `lora_A`, `lora_B` beside `weight`, and
the delta is B A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from pizero.agent.weights.source import Entry, Source
from pizero.types import Tensor

_LEAF = re.compile(r"(.+?)(/lora_|_lora_|\.lora_)([abAB])")
_BASE = {"/lora_": "/w", "_lora_": "", ".lora_": ".weight"}
SCALES = {"vlm": "lora.vlm.scale", "action": "lora.action.scale"}  # as overrides are called


@dataclass(frozen=True)
class MergedLora:
    """A source in which adapted leaves hold their base plus their delta.

    `scales` is alpha / rank of attention, by expert; 1 where it says nothing.
    """

    base: Source
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.base.metadata

    @cached_property
    def adapted(self) -> Mapping[str, tuple[str, str]]:
        """Base leaf -> the names of its A and B."""
        found: dict[str, dict[str, str]] = {}
        for name in self.base.entries:
            if match := _LEAF.fullmatch(name):
                stem, joint, which = match.groups()
                found.setdefault(f"{stem}{_BASE[joint]}", {})[which.lower()] = name
        for leaf, parts in found.items():
            if leaf not in self.base.entries or len(parts) != 2:
                lacks = leaf if leaf not in self.base.entries else f"{leaf}'s other half"
                raise ValueError(
                    f"{self.path}: LoRA leaves {sorted(parts.values())} without {lacks}; an "
                    "adapter alone is no policy: merge it into its base, or give the full tree"
                )
        return {leaf: (parts["a"], parts["b"]) for leaf, parts in found.items()}

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._whole

    @cached_property
    def _whole(self) -> Mapping[str, Entry]:
        gone = {name for pair in self.adapted.values() for name in pair}
        return {name: entry for name, entry in self.base.entries.items() if name not in gone}

    def read(self, name: str) -> Tensor:
        """A stored tensor. A merged one comes in float32 at least: whoever takes it rounds once."""
        weight = self.base.read(name)
        if name not in self.adapted:
            return weight
        a, b = self._parts(name)
        merged = weight.to(torch.promote_types(weight.dtype, a.dtype))
        if name.endswith(".weight"):
            return merged.add_(self._delta(name, a, b))
        for layer, x, y in zip(merged, a, b, strict=True):  # a delta of one layer in memory
            layer += self._delta(name, x, y)
        return merged

    def gradients(self, name: str, merged: Tensor) -> dict[str, Tensor]:
        """Those of an adapted leaf's A and B, under their names, from that of the merged weight."""
        parts = [part.to(merged.dtype).requires_grad_() for part in self._parts(name)]
        with torch.enable_grad():
            told = (self._delta(name, *parts) * merged).sum()
        return dict(zip(self.adapted[name], torch.autograd.grad(told, parts), strict=True))

    def _parts(self, name: str) -> list[Tensor]:
        return [self.base.read(part).float() for part in self.adapted[name]]

    def _delta(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        if name.endswith(".weight"):
            return b @ a
        if "/attn/" not in name:
            return a @ b
        if re.fullmatch(r".*/attn_vec_einsum(_1)?/w", name):
            b = b.sum(dim=-3, keepdim=True)  # head rank width: the label N of "BTNH,NHL->BTL"
        expert = "action" if name.endswith("_1/w") else "vlm"
        return self.scales.get(expert, 1.0) * (a @ b)
