"""How flow time and noisy actions become tokens.

Two arrangements exist. pi0 mixes the time into every action token; pi0.5 leaves the tokens alone
and lets the time modulate the expert's norms. Both split off what depends on the time alone, so
sampling makes it once for all Euler steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from pizero.types import Float, Tensor


@dataclass(frozen=True)
class SinusoidalTime:
    """[sin, cos] of 2 pi t / period; periods rise geometrically from the shortest to the longest.

    `reverse` embeds 1 - t, for weights trained with time counted from action to noise. The angles
    reach 1600 rad, so they are made in float64: float32 would cost four digits of the velocity.
    """

    min_period: float
    max_period: float
    reverse: bool

    def __call__(self, t: Float[Tensor, " rows"], width: int) -> Float[Tensor, "rows {width}"]:
        t = t.double()
        fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=t.device)
        period = self.min_period * (self.max_period / self.min_period) ** fraction
        angle = (1 - t if self.reverse else t)[:, None] * (2 * math.pi / period)
        return torch.cat((angle.sin(), angle.cos()), dim=-1).float()


class MixedActionEncoder(nn.Module):
    """pi0: `out(silu(action_mix(in(a)) + time_mix(time)))` for every action of the chunk.

    Published models concatenate action and time and use one matrix; its two halves are the two
    mixes here, so their order in the concatenation is the converter's business alone.
    """

    cond_dim = None

    def __init__(self, *, action_dim: int, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(action_dim, width)
        self.action_mix = nn.Linear(width, width, bias=False)
        self.time_mix = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def token_term(self, time: Float[Tensor, "rows width"]) -> Float[Tensor, "rows 1 width"]:
        """The part of the tokens that depends on the time alone."""
        return self.time_mix(time.to(self.time_mix.weight.dtype))[:, None]

    def condition(self, time: Float[Tensor, "rows width"]) -> None:
        """The time reaches the expert through its tokens only."""
        return None

    def forward(
        self, actions: Float[Tensor, "b h a"], token_term: Float[Tensor, "_ 1 width"]
    ) -> Float[Tensor, "b h width"]:
        x = self.action_mix(self.in_proj(actions.to(self.in_proj.weight.dtype)))
        return self.out_proj(F.silu(x + token_term))


class AdaptiveActionEncoder(nn.Module):
    """pi0.5: tokens are a projection of the actions; the time becomes the norms' condition."""

    def __init__(self, *, action_dim: int, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(action_dim, width)
        self.time_in = nn.Linear(width, width)
        self.time_out = nn.Linear(width, width)

    def token_term(self, time: Float[Tensor, "rows width"]) -> None:
        """The tokens do not depend on the time."""
        return None

    def condition(self, time: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """What modulates the expert's norms."""
        return F.silu(self.time_out(F.silu(self.time_in(time.to(self.time_in.weight.dtype)))))

    def forward(
        self, actions: Float[Tensor, "b h a"], token_term: None
    ) -> Float[Tensor, "b h width"]:
        return self.in_proj(actions.to(self.in_proj.weight.dtype))
