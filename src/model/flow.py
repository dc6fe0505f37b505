"""Flow matching: the path from noise to actions, and how flow times are drawn.

Flow time t is 0 at noise and 1 at the action, as in the pi0 paper (Black et al. 2024, eq. 1).
openpi and LeRobot count the other way; only the time embedding and the weight converters know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pizero.types import Float, Tensor


@dataclass(frozen=True)
class FlowPath:
    """Straight lines from noise to action; `sig_min` of the noise stays at the end.

    Zero for openpi and LeRobot, 0.001 for open-pi-zero.
    """

    sig_min: float = 0.0

    def point(
        self,
        noise: Float[Tensor, "*b h a"],
        actions: Float[Tensor, "*#b h a"],
        t: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*b h a"]:
        """Where the path is at time t."""
        t = t.to(noise.dtype)[..., None, None]
        return (1 - (1 - self.sig_min) * t) * noise + t * actions

    def velocity(
        self, noise: Float[Tensor, "*#b h a"], actions: Float[Tensor, "*#b h a"]
    ) -> Float[Tensor, "*b h a"]:
        """The velocity of the path, the same at every time: the regression target."""
        return actions - (1 - self.sig_min) * noise


@dataclass(frozen=True)
class UniformTime:
    """Flow times drawn evenly from [0, high)."""

    high: float = 1.0

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        return self.high * torch.rand(tuple(shape), generator=generator)


@dataclass(frozen=True)
class BetaTime:
    """t = high * (1 - z) with z ~ Beta(alpha, beta): the default lingers near the noise.

    openpi, LeRobot and open-pi-zero all use alpha 1.5, beta 1, high 0.999 (in this time direction).
    """

    alpha: float = 1.5
    beta: float = 1.0
    high: float = 0.999

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        # torch.distributions.Beta takes no generator, and a draw must depend on its sample alone.
        gamma = torch._standard_gamma  # pyright: ignore[reportPrivateImportUsage]
        x = gamma(torch.full(tuple(shape), self.alpha), generator=generator)
        y = gamma(torch.full(tuple(shape), self.beta), generator=generator)
        return self.high * (1 - x / (x + y))


TimeSampler = UniformTime | BetaTime


def euler_times(num_steps: int, device: torch.device) -> Float[Tensor, " steps"]:
    """The flow time of every Euler step, as openpi reaches it: counting down in float32.

    Its rounding is part of the published numbers: at the 1600 rad of the time embedding, exact
    times would move the actions by 1e-4.
    """
    left = torch.ones(1, device=device)
    times = []
    for _ in range(num_steps):
        times.append(1 - left.double())
        left = left - 1 / num_steps
    return torch.cat(times)
