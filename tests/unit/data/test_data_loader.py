"""Loaders: the same batches for any number of ranks, workers, restarts; memory stays flat."""

from __future__ import annotations

import itertools
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rlds_demo import open_demo

from pizero.data import Mix, TrainLoader, ValLoader
from pizero.data.rlds import FileReader
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


def test_a_windowed_order_does_not_depend_on_ranks_either(make_loader, monkeypatch):
    windowed = {"order": "windowed", "window": 3}
    reference = _rows(_take(make_loader(**windowed), 3))
    assert reference != _rows(_take(make_loader(), 3))
    rows: dict[int, tuple] = {}
    for rank in range(3):
        rows |= _rows(_take(make_loader(rank=rank, world_size=3, num_workers=1, **windowed), 3))
    assert rows == reference
    resumed = make_loader(start_sample=48, **windowed)
    assert _rows(_take(resumed, 1)) == {k: v for k, v in reference.items() if k >= 48}
    advised = []
    monkeypatch.setattr(FileReader, "advise", lambda self, *span: advised.append(span))
    _take(make_loader(**windowed), 1)
    assert advised  # the block's episodes and the next one's
    assert len(set(advised)) == len(advised)
    assert all(Path(path).stat().st_size >= start + size for path, start, size in advised)


def test_damaged_samples_are_skipped_counted_and_said(demo_path, make_loader, tmp_path, caplog):
    path = tmp_path / "demo"
    shutil.copytree(demo_path, path, ignore=shutil.ignore_patterns(".pizero_index"))
    data, skipping = open_demo(path), open_demo(path, on_error="skip")
    frame = int(data.episode_starts[4])
    row = int(data.starts[4])
    offset, size = data.index.step_values("observation/corner")[row]
    file = Path(data.index.files[int(data.index.shard[4])])
    content = bytearray(file.read_bytes())
    content[offset + size // 2] ^= 1
    file.write_bytes(content)  # while the index is open
    message = r"observation/corner at offset \d+: the image changed after it was indexed"
    with pytest.raises(ValueError, match=message):
        _take(make_loader(dataset=data, global_batch_size=len(data)), 1)
    loader = make_loader(dataset=skipping, global_batch_size=len(data))
    batch = _take(loader, 1)[0]
    assert loader.skipped == 1
    assert f"skipped frame {frame}" in caplog.text
    mix = Mix(datasets={"demo": data})
    _, frames = mix.locate(mix.order(7), np.arange(len(data)))
    place = frames.tolist().index(frame)
    neighbour = frames.tolist().index(frame + 1)
    assert torch.equal(batch.actions[place], batch.actions[neighbour])
    # Opened anew, the record is left out as a whole.
    fresh = open_demo(path, on_error="skip")
    assert (fresh.num_episodes, len(fresh.index.damaged)) == (data.num_episodes - 1, 1)


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


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_resume_anywhere_with_other_ranks_and_workers(make_loader, order):
    """Twenty stops and restarts at random, each time on another number of ranks and workers."""
    changes = {"order": order, "window": 3}
    reference = _rows(_take(make_loader(**changes), 45))
    generator = np.random.default_rng(3)
    seen: dict[int, tuple] = {}
    done, restarts = 0, 0
    while restarts < 20:
        steps = int(generator.integers(1, 4))
        world, accumulate = [(1, 1), (2, 1), (3, 2), (4, 3), (8, 1), (1, 4)][generator.integers(6)]
        workers = int(generator.integers(3)) if world < 3 else 0
        places = {"world_size": world, "accumulate": accumulate, "num_workers": workers}
        for rank in range(world):
            loader = make_loader(start_sample=done * 24, rank=rank, **places, **changes)
            got = _rows(_take(loader, steps * accumulate))
            assert not seen.keys() & got.keys()  # no repeats
            seen |= got
        done, restarts = done + steps, restarts + 1
    assert sorted(seen) == list(range(done * 24))  # none missing
    assert all(seen[n] == reference[n] for n in seen)


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
    narrow = make_pipeline(max_tokens=9)
    with pytest.raises(
        ValueError, match=r"must give equal shapes, got a: .* and b: .*'max_tokens': 9"
    ):
        make_loader(dataset=mix, pipeline={"a": other, "b": narrow})
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
