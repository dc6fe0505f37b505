"""The order of samples, as a pure function of (seed, sample number).

Samples are numbered from 0 for the whole run. A number is looked up in three steps:

    round = number // M, slot = shuffle(number % M)      M slots make a round
    source = the one whose share of the slots holds it   shares are the weights, exact in a round
    frame  = shuffle(count % frames of the source)       count: how often the source came before

Both shuffles are Feistel networks, so nothing is stored and nothing is repeated: each source is
used up completely before it starts over with a new order. The state of a run is one integer.

The order of frames is global (any frame of the source may come next) or, for disks and networks
that seek slowly, windowed: episodes are shuffled and taken in blocks, frames are shuffled within a
block, so that what is read lies in few places and can be fetched ahead.
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
    one pass over everything; with them, a round has `round_size` slots shared out by weight. With
    `lengths`, the frames of each source's episodes, the order is windowed, `window` episodes in a
    block.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        round_size: int = 2**16,
        lengths: Sequence[np.ndarray] | None = None,
        window: int = 64,
    ) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.seed, self.window = seed, window
        if window < 1:
            raise ValueError(f"expected window >= 1, got {window}")
        self.lengths = None if lengths is None else [np.asarray(n, np.int64) for n in lengths]
        if self.lengths is not None and [int(n.sum()) for n in self.lengths] != self.sizes.tolist():
            raise ValueError("expected lengths of episodes that add up to the sizes")
        self._windows: dict[tuple[int, int], _Windows] = {}
        self._turns: dict[int, np.ndarray] = {}
        if not len(self.sizes) or self.sizes.min() < 1:
            raise ValueError(f"expected sources with at least one frame, got sizes {list(sizes)}")
        if weights is None and self.lengths is None:
            self.shares = self.sizes
        else:
            # The turns of a windowed order are counted, which wants rounds of a moderate size.
            weights = self.sizes.tolist() if weights is None else weights
            self.shares = _shares(np.asarray(weights, float), self.sizes, round_size)
        self._ends = np.cumsum(self.shares)

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and frame, int64 [n] each, of sample numbers [n]."""
        source, epoch, place = self._places(numbers)
        if self.lengths is None:
            key = mix_bits(self.seed, 2, source, epoch)
            return source, permute(place, self.sizes[source], key)
        frame = np.empty_like(place)
        for s, e in np.unique(np.stack([source, epoch]), axis=1).T.tolist():
            rows = (source == s) & (epoch == e)
            frame[rows] = self._window(s, e).frames(place[rows])
        return source, frame

    def blocks(self, numbers: np.ndarray) -> list[tuple[int, int, int]]:
        """The (source, epoch, block) that sample numbers [n] lie in, in a windowed order."""
        found: set[tuple[int, int, int]] = set()
        if self.lengths is None:
            return []
        source, epoch, place = self._places(numbers)
        for s, e in np.unique(np.stack([source, epoch]), axis=1).T.tolist():
            rows = (source == s) & (epoch == e)
            found |= {(s, e, b) for b in self._window(s, e).block_of(place[rows]).tolist()}
        return sorted(found)

    def following(self, source: int, epoch: int, block: int) -> tuple[int, int, int]:
        """The block that a source's samples come from next."""
        last = self._window(source, epoch).num_blocks - 1
        return (source, epoch + 1, 0) if block == last else (source, epoch, block + 1)

    def episodes(self, source: int, epoch: int, block: int) -> np.ndarray:
        """Episodes of the source, int64 [at most `window`], that make up a block."""
        return self._window(source, epoch).episodes(block)

    def _window(self, source: int, epoch: int) -> _Windows:
        key = (source, epoch)
        if key not in self._windows:
            assert self.lengths is not None
            for old in [k for k in self._windows if k[0] == source and k[1] < epoch - 1]:
                del self._windows[old]
            mixed = int(mix_bits(self.seed, 2, source, epoch))
            self._windows[key] = _Windows(self.lengths[source], mixed, self.window)
        return self._windows[key]

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, its pass over its frames, and how far that is, of sample numbers [n]."""
        numbers = np.asarray(numbers, np.int64)
        total = int(self._ends[-1])
        rounds, position = np.divmod(numbers, total)
        slot = permute(position, total, mix_bits(self.seed, 1, rounds))
        source = np.searchsorted(self._ends, slot, side="right")
        share = self.shares[source]
        turn = slot - (self._ends[source] - share)
        if self.lengths is not None:
            for r in np.unique(rounds).tolist():
                turn[rounds == r] = self._turns_of(r)[position[rounds == r]]
        count = rounds * share + turn
        epoch, place = np.divmod(count, self.sizes[source])
        return source, epoch, place

    def _turns_of(self, number: int) -> np.ndarray:
        """For each slot of a round, how often its source came before in that round."""
        if number not in self._turns:
            for old in [r for r in self._turns if r < number - 1]:
                del self._turns[old]
            total = int(self._ends[-1])
            slot = permute(np.arange(total), total, mix_bits(self.seed, 1, number))
            source = np.searchsorted(self._ends, slot, side="right")
            by_source = np.argsort(source, kind="stable")
            turns = np.empty(total, np.int64)
            turns[by_source] = np.arange(total) - (self._ends - self.shares)[source[by_source]]
            self._turns[number] = turns
        return self._turns[number]


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


class _Windows:
    """One pass over a source's frames in blocks of episodes."""

    def __init__(self, lengths: np.ndarray, key: int, window: int) -> None:
        self.key, self.window = key, window
        self._order = permute(np.arange(len(lengths)), len(lengths), key)
        self._ends = np.cumsum(lengths[self._order])
        self._starts = self._ends - lengths[self._order]
        self._stored = (np.cumsum(lengths) - lengths)[self._order]  # first frames in the source
        self._block_ends = np.append(self._ends[window - 1 :: window], self._ends[-1])
        self._block_ends = np.unique(self._block_ends)  # the last block may be a short one

    @property
    def num_blocks(self) -> int:
        return len(self._block_ends)

    def block_of(self, place: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._block_ends, place, side="right")

    def episodes(self, block: int) -> np.ndarray:
        start = 0 if block == 0 else self._block_ends[block - 1]
        inside = (self._starts >= start) & (self._ends <= self._block_ends[block])
        return self._order[inside]

    def frames(self, place: np.ndarray) -> np.ndarray:
        """The frame of the source at each place of this pass."""
        block = self.block_of(place)
        start = np.concatenate([[0], self._block_ends])[block]
        size = self._block_ends[block] - start
        place = start + permute(place - start, size, mix_bits(self.key, 1, block))
        episode = np.searchsorted(self._ends, place, side="right")
        return self._stored[episode] + place - self._starts[episode]


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
