"""Noise and flow times of each training sample, as a pure function of (seed, sample number).

So a batch gets the same draws on any rank, in any worker, after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pizero.types import Float, Int, Tensor

_MASK = (1 << 64) - 1


class TimeSampler(Protocol):
    """What draws flow times; the model brings it."""

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor: ...


def flow_draws(
    samples: Int[Tensor, " b"],
    *,
    seed: int,
    flow_samples: int,
    horizon: int,
    action_dim: int,
    time_sampler: TimeSampler,
) -> tuple[Float[Tensor, "b k horizon action_dim"], Float[Tensor, "b k"]]:
    """Noise and flow times for each sample number, on the CPU."""
    generator = torch.Generator()
    noise = torch.empty(len(samples), flow_samples, horizon, action_dim)
    times = torch.empty(len(samples), flow_samples)
    for i, sample in enumerate(samples.tolist()):
        generator.manual_seed(mix(seed, sample) >> 1)
        torch.randn(noise.shape[1:], generator=generator, out=noise[i])
        times[i] = time_sampler.sample((flow_samples,), generator)
    return noise, times


def mix(*keys: int) -> int:
    """A 64-bit hash of integers (the finaliser of splitmix64, applied to one key after another)."""
    state = 0
    for key in keys:
        state = (state + (key & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
