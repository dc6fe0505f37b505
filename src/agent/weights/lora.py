"""openpi's LoRA leaves, merged into the weights they belong to.

A base leaf `w` has `lora_a`, `lora_b` beside it (attention), or `_lora_a`, `_lora_b` behind its
name (feed-forward). The delta is A B for every head; for the output projection openpi sums the
rank label over heads, so every head's A meets the sum of all B. The published ranks and alphas
(16/16, 32/32) scale it by one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from pizero.agent.weights.source import Entry, Source

_LEAF = re.compile(r"(.+?)(/lora_|_lora_)([ab])")


@dataclass(frozen=True)
class MergedLora:
    """A source in which adapted leaves hold their base plus their delta."""

    base: Source
    scale: float = 1.0

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
                found.setdefault(f"{stem}/w" if joint[0] == "/" else stem, {})[which] = name
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

    def read(self, name: str) -> torch.Tensor:
        weight = self.base.read(name)
        if name not in self.adapted:
            return weight
        a, b = (self.base.read(part).to(torch.float32) for part in self.adapted[name])
        if re.fullmatch(r".*/attn_vec_einsum(_1)?/w", name):
            b = b.sum(dim=1, keepdim=True)  # layer head rank width: the label N of "BTNH,NHL->BTL"
        return torch.add(weight.float(), a @ b, alpha=self.scale).to(weight.dtype)
