"""Root-mean-square norms: plain, and adaptive to the flow time.

Both take and return the dtype of `x` and compute in float32. The learned scale is stored as an
offset from one, as Gemma stores it, so a zero weight is the identity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from pizero.types import Float, Tensor


class Modulation(NamedTuple):
    """Scale, shift and gate of one adaptive norm; they depend on the flow time alone."""

    scale: Tensor
    shift: Tensor
    gate: Tensor

    def step(self, i: int) -> Modulation:
        """Row `i` of a table that has a row for each Euler step."""
        return Modulation(self.scale[i : i + 1], self.shift[i : i + 1], self.gate[i : i + 1])


class RMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)` (Zhang & Sennrich 2019, with Gemma's offset)."""

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(
        self, x: Float[Tensor, "*b width"], modulation: None = None
    ) -> Float[Tensor, "*b width"]:
        return (_normalise(x, self.eps) * (1 + self.weight.float())).to(x.dtype)


class AdaRMSNorm(nn.Module):
    """An RMS norm whose scale, shift, and gate of the branch it opens come from a condition.

    pi0.5's adaRMS: `norm(x) * (1 + scale) + shift`, and the residual becomes `x + gate * branch`.
    It starts closed (zero weights), so an untrained block is the identity.
    """

    def __init__(self, width: int, *, cond_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(cond_dim, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def modulation(self, cond: Float[Tensor, "rows cond_dim"]) -> Modulation:
        """Scale, shift and gate, each [rows 1 width], in float32."""
        device = "cpu" if cond.is_meta else cond.device.type  # autocast knows no meta device
        with torch.autocast(device, enabled=False):
            out = self.dense(cond.to(self.dense.weight.dtype)).float()
        return Modulation(*out[:, None].chunk(3, dim=-1))

    def forward(
        self, x: Float[Tensor, "b s width"], modulation: Modulation | None
    ) -> Float[Tensor, "b s width"]:
        if modulation is None:
            raise ValueError("an adaptive norm needs the modulation of a flow time, got none")
        scale, shift, _ = modulation
        return (_normalise(x, self.eps) * (1 + scale) + shift).to(x.dtype)


def make_norm(width: int, *, cond_dim: int | None, eps: float) -> RMSNorm | AdaRMSNorm:
    """A plain norm, or an adaptive one where there is a condition."""
    if cond_dim is None:
        return RMSNorm(width, eps=eps)
    return AdaRMSNorm(width, cond_dim=cond_dim, eps=eps)


def _normalise(x: Tensor, eps: float) -> Tensor:
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
