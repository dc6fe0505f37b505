"""Keys and values of tokens that have been run, kept for tokens that will look at them."""

from __future__ import annotations

from dataclasses import dataclass

from pizero.model.layout import TokenLayout
from pizero.types import Bool, Tensor


@dataclass(frozen=True)
class PrefixCache:
    """Rotated keys and values [b p g d] of every layer. A value: extended by making a new one."""

    layout: TokenLayout
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    valid: Bool[Tensor, "b p"] | None

    def repeat(self, samples: int) -> PrefixCache:
        """Rows in groups of `samples`: several flow samples look at one observation's prefix."""
        if samples == 1:
            return self
        return PrefixCache(
            self.layout,
            tuple(k.repeat_interleave(samples, dim=0) for k in self.keys),
            tuple(v.repeat_interleave(samples, dim=0) for v in self.values),
            None if self.valid is None else self.valid.repeat_interleave(samples, dim=0),
        )
