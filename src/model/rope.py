"""Rotary position embedding (Su et al. 2021) in the half-split layout of Gemma.

Axes: b batch, s tokens, h heads, d head_dim, c = d / 2 rotation planes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pizero.types import Float, Int, Tensor


class Rotary(NamedTuple):
    """Cosine and sine of every token's rotation angles, made once per forward pass."""

    cos: Float[Tensor, "b s 1 c"]
    sin: Float[Tensor, "b s 1 c"]


def rotary_table(positions: Int[Tensor, "b s"], *, head_dim: int, base: float) -> Rotary:
    """The rotations of tokens at `positions`, in float32.

    The frequencies are made here, not kept in a buffer: casting a model to bfloat16 would round
    them, an error as large as that of the whole attention.
    """
    planes = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None, None].float() * base ** (-2 * planes / head_dim)
    return Rotary(angle.cos(), angle.sin())


def rotate(x: Float[Tensor, "b s h d"], rotary: Rotary) -> Float[Tensor, "b s h d"]:
    """Rotate each head by its token's angles, in at least float32; returned in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    low, high = x.to(wide).chunk(2, dim=-1)
    cos, sin = rotary.cos, rotary.sin
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
