"""The order of samples, as a pure function of (seed, sample number).

Samples are numbered from 0 for the whole run. A number is looked up in three steps:

    round = number // M, slot = shuffle(number % M)      M slots make a round
    source = the one whose share of the slots holds it   shares are the weights, exact in a round
    frame  = shuffle(count % frames of the source)       count: how often the source came before

Both shuffles are Feistel networks, so nothing is stored and nothing is repeated: each source is
used up completely before it starts over with a new order. The state of a run is one integer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pizero.data.hashing import mix_bits

ROUNDS = 4
_ROUND_KEYS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)


def permute(positions: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """A permutation of range(size) that depends on the key, at the given positions.

    int64 [n]; `size` and `key` may differ from entry to entry. Positions must be below the size.
    """
    positions, size, key = np.broadcast_arrays(positions, size, mix_bits(key))
    values, limit = positions.astype(np.uint64), size.astype(np.uint64)
    # Half the bits of the smallest power of four that covers the size; values that leave the range
    # walk on until they come back, which takes fewer than four tries on average.
    bits = np.ceil(np.log2(np.maximum(size, 2)) / 2).astype(np.uint64)
    bits = np.maximum(bits + (np.uint64(4) ** bits < limit), 1)
    outside = np.ones(len(values), bool)
    while outside.any():
        values[outside] = _feistel(values[outside], bits[outside], key[outside])
        outside = values >= limit
    return values.astype(np.int64)


class Order:
    """Which source and which of its frames each sample number stands for.

    `sizes` are the frames of each source. Without `weights` all frames count alike and a round is
    one pass over everything; with them, a round has `round_size` slots shared out by weight.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        round_size: int = 2**16,
    ) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.seed = seed
        if not len(self.sizes) or self.sizes.min() < 1:
            raise ValueError(f"expected sources with at least one frame, got sizes {list(sizes)}")
        if weights is None:
            self.shares = self.sizes
        else:
            self.shares = _shares(np.asarray(weights, float), self.sizes, round_size)
        self._ends = np.cumsum(self.shares)

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and frame, int64 [n] each, of sample numbers [n]."""
        numbers = np.asarray(numbers, np.int64)
        total = int(self._ends[-1])
        rounds, position = np.divmod(numbers, total)
        slot = permute(position, total, mix_bits(self.seed, 1, rounds))
        source = np.searchsorted(self._ends, slot, side="right")
        share = self.shares[source]
        count = rounds * share + slot - (self._ends[source] - share)
        epoch, place = np.divmod(count, self.sizes[source])
        frame = permute(place, self.sizes[source], mix_bits(self.seed, 2, source, epoch))
        return source, frame


def rank_samples(
    first: int, *, global_batch_size: int, rank: int, world_size: int, accumulate: int = 1
) -> np.ndarray:
    """Sample numbers [accumulate, micro batch] of one rank for the global batch from `first` on.

    The ranks' slices are disjoint and make up `first .. first + global_batch_size - 1`.
    """
    pieces = world_size * accumulate
    if global_batch_size < 1 or global_batch_size % pieces:
        raise ValueError(
            f"global_batch_size {global_batch_size} does not divide into {world_size} ranks times "
            f"{accumulate} accumulated batches"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"expected rank in 0..{world_size - 1}, got {rank}")
    numbers = first + np.arange(global_batch_size, dtype=np.int64)
    return numbers.reshape(accumulate, world_size, -1)[:, rank]


def _feistel(values: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << bits) - np.uint64(1)
    left, right = values >> bits, values & mask
    for round_key in _ROUND_KEYS:
        left, right = right, left ^ (mix_bits((key ^ round_key) + right) & mask)
    return (left << bits) | right


def _shares(weights: np.ndarray, sizes: np.ndarray, round_size: int) -> np.ndarray:
    """Whole slots per source, by largest remainder; a positive weight gets at least one."""
    if weights.shape != sizes.shape or not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(
            f"expected {len(sizes)} weights >= 0 with a positive sum, got {weights.tolist()}"
        )
    round_size = max(round_size, 256 * len(weights))
    exact = weights / weights.sum() * round_size
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - shares), kind="stable")
    shares[order[: round_size - int(shares.sum())]] += 1
    return np.where(weights > 0, np.maximum(shares, 1), 0)
