"""Keys and values of tokens that have been run, kept for tokens that will look at them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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

    def with_room(self, length: int) -> RoomyCache:
        """A copy with room for `length` tokens behind these."""
        k = self.keys[0]
        valid = self.valid
        if valid is None:
            valid = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)

        def widen(x: Tensor) -> Tensor:
            return torch.cat((x, x.new_zeros(x.shape[0], length, *x.shape[2:])), dim=1)

        return RoomyCache(
            tuple(widen(k) for k in self.keys), tuple(widen(v) for v in self.values), widen(valid)
        )


@dataclass(frozen=True)
class RoomyCache:
    """Buffers [b p g d] that tokens fill one at a time, in place: the cache of text generation.

    The one cache that changes. It belongs to the loop that made it, and to nobody else.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    valid: Bool[Tensor, "b p"]
