"""Noise and flow times of each training sample, as a pure function of (seed, sample number).

So a batch gets the same draws on any rank, in any worker, after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from pizero.data.hashing import mix_bits
from pizero.types import Float, Int, Tensor

STREAM = 0x6E6F697365  # keeps these draws apart from those of augmentation and order


@runtime_checkable
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
    # torch's CPU generator uses 32 bits of its seed, so now and then two samples share their draws.
    for i, key in enumerate((mix_bits(seed, STREAM, samples.numpy()) >> np.uint64(32)).tolist()):
        generator.manual_seed(key)
        torch.randn(noise.shape[1:], generator=generator, out=noise[i])
        times[i] = time_sampler.sample((flow_samples,), generator)
    return noise, times
