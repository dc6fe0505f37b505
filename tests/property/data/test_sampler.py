"""Properties of the order of samples and of the codecs below it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pizero.data.hashing import mix_bits
from pizero.data.sampler import Order, permute, rank_samples

quick = settings(deadline=None, max_examples=40)

seeds = st.integers(0, 2**31)


@quick
@given(size=st.integers(1, 3000), key=seeds)
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 255, 256, 257, 4**9, 4**9 + 1, 2_195_527])
def test_permute_is_a_bijection_at_the_edges(size):
    seen = np.zeros(size, bool)
    seen[permute(np.arange(size), size, 1)] = True
    assert seen.all()


def test_permute_looks_random():
    size = 100_003
    values = permute(np.arange(size), size, 0).astype(float)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(values, np.arange(size))[0, 1]) < 0.01
    other = permute(np.arange(size), size, 1)
    assert (values == other).mean() < 1e-3
    quarters = np.histogram(values[: size // 4], bins=4, range=(0, size))[0] / (size // 4)
    np.testing.assert_allclose(quarters, 0.25, atol=0.02)


def test_permute_takes_sizes_and_keys_per_entry():
    positions = np.array([0, 1, 2, 0, 1])
    sizes, keys = np.array([3, 3, 3, 2, 2]), np.array([5, 5, 5, 9, 9])
    mixed = permute(positions, sizes, keys)
    assert mixed[:3].tolist() == permute(np.arange(3), 3, 5).tolist()
    assert mixed[3:].tolist() == permute(np.arange(2), 2, 9).tolist()


@quick
@given(
    lengths=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=40), min_size=1, max_size=3),
    seed=seeds,
    window=st.integers(1, 12),
)
def test_a_windowed_order_uses_each_source_up_block_by_block(lengths, seed, window):
    arrays = [np.array(own) for own in lengths if sum(own)]
    if not arrays:
        return
    sizes = [int(own.sum()) for own in arrays]
    order = Order(sizes, seed=seed, lengths=arrays, window=window, weights=[1.0] * len(sizes))
    numbers = np.arange(8 + 4 * max(sizes) * len(sizes))
    source, frame = order(numbers)
    for s, size in enumerate(sizes):
        own = frame[source == s]
        assert len(own) >= 2 * size
        for epoch in range(2):
            assert sorted(own[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
        # What is read lies in the episodes of the block that the order names, and of no other.
        block = order.blocks(numbers[source == s][:1])[0]
        episodes = np.repeat(np.arange(len(arrays[s])), arrays[s])
        wanted = order.episodes(*block)
        assert len(wanted) <= window or (arrays[s][wanted] == 0).any()
        count = int(arrays[s][wanted].sum())
        assert set(episodes[own[:count]]) <= set(wanted.tolist())
        assert sorted(own[:count].tolist()) == np.flatnonzero(np.isin(episodes, wanted)).tolist()
    some = np.array([5, 3, len(numbers) - 1])
    np.testing.assert_array_equal(np.stack(order(some)), np.stack((source, frame))[:, some])


@quick
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    seed=seeds,
    first_round=st.integers(0, 10**6),
)
def test_a_round_is_every_frame_once(sizes, seed, first_round):
    total = sum(sizes)
    source, frame = Order(sizes, seed=seed)(np.arange(total) + first_round * total)
    pairs = sorted(zip(source.tolist(), frame.tolist(), strict=True))
    assert pairs == [(s, f) for s, size in enumerate(sizes) for f in range(size)]


@quick
@given(
    sizes=st.lists(st.integers(1, 500), min_size=2, max_size=6),
    seed=seeds,
    data=st.data(),
)
def test_weights_hold_exactly_in_a_round(sizes, seed, data):
    weights = data.draw(
        st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)), label="weights"
    )
    order = Order(sizes, seed=seed, weights=weights, round_size=2048)
    count = int(order.shares.sum())
    source, frame = order(np.arange(count))
    got = np.bincount(source, minlength=len(sizes)) / count
    np.testing.assert_allclose(got, np.array(weights) / sum(weights), atol=1e-3)
    for s in range(len(sizes)):  # no frame is used twice before all are used once
        uses = np.bincount(frame[source == s], minlength=sizes[s])
        assert uses.max() - uses.min() <= 1


@quick
@given(
    seed=seeds,
    first=st.integers(0, 10**9),
    world=st.sampled_from([1, 2, 3, 8]),
    accumulate=st.sampled_from([1, 2]),
)
def test_ranks_are_disjoint_and_complete(seed, first, world, accumulate):
    options = {"global_batch_size": 48, "world_size": world, "accumulate": accumulate}
    slices = [rank_samples(first, rank=r, **options) for r in range(world)]
    assert all(s.shape == (accumulate, 48 // world // accumulate) for s in slices)
    assert sorted(np.concatenate(slices, axis=None).tolist()) == list(range(first, first + 48))
    order = Order([1000, 50], seed=seed, weights=[1, 1])
    whole = np.stack(order(first + np.arange(48)))
    for numbers in slices:
        np.testing.assert_array_equal(
            np.stack(order(numbers.ravel())), whole[:, numbers.ravel() - first]
        )


@quick
@given(seed=seeds, number=st.integers(0, 2**40))
def test_order_is_a_function_of_seed_and_number(seed, number):
    order = Order([37, 12], seed=seed, weights=[2, 1])
    around = order(np.arange(number, number + 5))
    alone = order(np.array([number + 3]))
    assert (around[0][3], around[1][3]) == (alone[0][0], alone[1][0])


def test_seeds_and_epochs_differ():
    order, other = Order([1000], seed=0), Order([1000], seed=1)
    first, second = order(np.arange(1000))[1], order(np.arange(1000, 2000))[1]
    assert (first == second).mean() < 0.02
    assert (first == other(np.arange(1000))[1]).mean() < 0.02


def test_tiny_weights_get_a_slot_and_zero_weights_none():
    order = Order([10, 10, 10], seed=0, weights=[1, 1e-9, 0])
    assert order.shares.tolist()[1:] == [1, 0]
    source, _ = order(np.arange(int(order.shares.sum())))
    assert np.bincount(source, minlength=3)[1:].tolist() == [1, 0]


def test_refusals():
    with pytest.raises(ValueError, match=r"at least one frame, got sizes \[3, 0\]"):
        Order([3, 0], seed=0)
    for weights in ([1], [1, -1], [0, 0]):
        with pytest.raises(ValueError, match="expected 2 weights >= 0 with a positive sum, got"):
            Order([3, 3], seed=0, weights=weights)


def test_hash_bits_are_balanced_and_depend_on_each_argument():
    bits = mix_bits(0, np.arange(4096)[:, None] * np.ones(1, int), 5)[:, 0]
    ones = (bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    np.testing.assert_allclose(ones.mean(0), 0.5, atol=0.05)
    values = {int(mix_bits(a, b, c)) for a in range(4) for b in range(4) for c in range(4)}
    assert len(values) == 64
    assert int(mix_bits(-1, 2**40)) != int(mix_bits(1, 2**40))
