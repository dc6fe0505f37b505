"""Random numbers as a function of (seed, sample number), without any state.

Everything random about a sample comes from here or from a generator seeded from here, which is why
a resumed run, another number of ranks or of workers sees the same samples.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix_bits(*parts: int | np.ndarray) -> np.ndarray:
    """A uint64 hash of its integer arguments, broadcast together (splitmix64 finaliser)."""
    with np.errstate(over="ignore"):  # wrapping is what a hash is made of
        state = np.zeros((), np.uint64)
        for part in parts:
            word = np.asarray(part)
            word = word.astype(np.int64).view(np.uint64) if word.dtype.kind == "i" else word
            state = (state ^ word.astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def uniform(seed: int, numbers: np.ndarray, draws: int) -> np.ndarray:
    """float64 [n draws] in [0, 1) that depends only on the seed and each sample number [n]."""
    bits = mix_bits(seed, numbers[:, None], np.arange(draws))
    return (bits >> np.uint64(11)) * 2.0**-53
