"""Loaders: the same batches for any number of ranks, workers, restarts; memory stays flat."""

from __future__ import annotations

import itertools
import resource

import numpy as np
import pytest
import torch
from rlds_demo import open_demo

from pizero.data import Mix, TrainLoader, ValLoader
from pizero.types import Batch


@pytest.fixture
def make_loader(demo, make_pipeline):
    def make(**changes) -> TrainLoader:
        arguments = {
            "dataset": demo,
            "pipeline": make_pipeline(),
            "seed": 7,
            "global_batch_size": 24,
        }
        return TrainLoader(**(arguments | changes))

    return make


def _take(loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def _rows(batches: list[Batch]) -> dict[int, tuple]:
    """Everything about each sample, by its number."""
    rows = {}
    for batch in batches:
        observation = batch.observation
        present = observation.image_mask
        if present is None:
            present = torch.ones(observation.images.shape[:2], dtype=torch.bool)
        for i, sample in enumerate(batch.sample.tolist()):
            assert sample not in rows
            parts = (observation.images, present, observation.tokens, observation.state)
            parts += (batch.actions, batch.action_mask)
            rows[sample] = tuple(part[i].numpy().tobytes() for part in parts)
    return rows


def test_ranks_workers_and_accumulation_do_not_matter(make_loader):
    reference = _rows(_take(make_loader(), 3))
    assert sorted(reference) == list(range(72))
    for world, accumulate in [(1, 2), (2, 1), (3, 2), (8, 3)]:
        rows: dict[int, tuple] = {}
        for rank in range(world):
            loader = make_loader(rank=rank, world_size=world, accumulate=accumulate)
            got = _rows(_take(loader, 3 * accumulate))
            assert not set(got) & set(rows)
            assert len(got) == 72 // world
            rows |= got
        assert rows == reference


@pytest.mark.parametrize(("workers", "method"), [(2, "fork"), (1, "spawn")])
def test_workers_give_the_same_batches(make_loader, workers, method):
    reference = _rows(_take(make_loader(), 3))
    loader = make_loader(num_workers=workers, start_method=method)
    assert _rows(_take(loader, 3)) == reference


def test_resume_from_one_integer(make_loader):
    reference = _rows(_take(make_loader(), 4))
    loader = make_loader(accumulate=2)
    iterator = iter(loader)
    for _ in range(5):  # two global batches and half of the third
        next(iterator)
    assert loader.samples == 48
    resumed = make_loader(start_sample=loader.samples, world_size=2, rank=1)
    rows = _rows(_take(resumed, 2))
    assert rows == {k: reference[k] for k in rows}
    assert sorted(rows) == [*range(60, 72), *range(84, 96)]


def test_batches_hold_the_frames_of_the_order(demo, make_pipeline, make_loader):
    mix = Mix(datasets={"demo": demo})
    _, frames = mix.locate(mix.order(7), np.arange(len(demo)))
    assert sorted(frames.tolist()) == list(range(len(demo)))
    pipeline = make_pipeline()
    loader = make_loader(global_batch_size=len(demo))
    batch = _take(loader, 1)[0]
    expected = pipeline.collate(
        [pipeline.encode(demo.read(i)) for i in frames.tolist()], np.arange(37)
    )
    assert torch.equal(batch.observation.images, expected.observation.images)
    assert torch.equal(batch.actions, expected.actions)


def test_each_dataset_may_have_its_own_pipeline(demo_path, make_pipeline, make_loader):
    demo = open_demo(demo_path)
    other = make_pipeline(normalization={"state": "identity", "action": "identity"})
    mix = Mix(datasets={"a": demo, "b": demo}, weights={"a": 1, "b": 1})
    pipelines = {"a": make_pipeline(), "b": other}
    loader = make_loader(dataset=mix, pipeline=pipelines)
    batch = _take(loader, 1)[0]
    dataset, frame = mix.locate(mix.order(7), batch.sample.numpy())
    assert set(dataset.tolist()) == {0, 1}
    for i, (d, f) in enumerate(zip(dataset.tolist(), frame.tolist(), strict=True)):
        expected = pipelines["ab"[d]].encode(demo.read(f))["actions"]
        np.testing.assert_array_equal(batch.actions[i], expected)
    with pytest.raises(ValueError, match=r"a pipeline for every dataset, got none for \['b'\]"):
        make_loader(dataset=mix, pipeline={"a": other})


def test_validation_repeats_a_fixed_subset(demo_path, make_pipeline):
    def make(**changes) -> ValLoader:
        arguments = {
            "dataset": open_demo(demo_path, split="val"),
            "pipeline": make_pipeline(),
            "seed": 1,
            "num_samples": 26,
            "global_batch_size": 12,
        }
        return ValLoader(**(arguments | changes))

    loader = make()
    assert len(loader) == 2
    first = _rows(list(loader))
    assert _rows(list(loader)) == first
    assert sorted(first) == list(range(24))
    assert len({row[3:] for row in first.values()}) == 24  # no frame twice
    split = [_rows(list(make(rank=r, world_size=3, num_workers=r // 2))) for r in range(3)]
    assert all(len(rows) == 8 for rows in split)
    assert split[0] | split[1] | split[2] == first
    assert _rows(list(make(seed=2))) != first
    assert len(make(num_samples=1000)) == 3
    with pytest.raises(ValueError, match=r"one validation batch of 64, got num_samples=26 of 37"):
        make(global_batch_size=64)


def test_sizes_that_do_not_divide_are_refused(make_loader):
    with pytest.raises(ValueError, match="global_batch_size 24 does not divide into 5 ranks"):
        make_loader(world_size=5)
    with pytest.raises(ValueError, match=r"expected rank in 0\.\.1, got 2"):
        make_loader(world_size=2, rank=2)
    with pytest.raises(ValueError, match="multiple of global_batch_size 24, got 30"):
        make_loader(start_sample=30)


def test_memory_is_flat(make_loader):
    iterator = iter(make_loader())
    for _ in range(40):
        next(iterator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        next(iterator)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2048, f"grew by {grown} KiB over 2400 samples"
