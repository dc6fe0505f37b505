"""Mixtures: shares, balance over groups, and that frames come from the right episodes."""

from __future__ import annotations

import numpy as np
import pytest
from rlds_demo import LENGTHS, open_demo

from pizero.data import Mix


def _draw(mix: Mix, count: int) -> tuple[np.ndarray, np.ndarray]:
    return mix.locate(mix.order(0), np.arange(count))


def test_without_weights_every_frame_comes_once_a_round(demo_path):
    one, two = open_demo(demo_path), open_demo(demo_path, episodes=[1, 3])
    mix = Mix(datasets={"one": one, "two": two})
    assert len(mix) == len(one) + len(two)
    dataset, frame = _draw(mix, len(mix))
    assert sorted(frame[dataset == 0].tolist()) == list(range(len(one)))
    assert sorted(frame[dataset == 1].tolist()) == list(range(len(two)))
    sample = mix.read(1, 1)
    assert (sample["dataset"], sample["state"][0, 0]) == ("two", 3)


def test_weights_are_shares_of_samples(demo_path):
    demo = open_demo(demo_path)
    mix = Mix(datasets={"a": demo, "b": demo, "c": demo}, weights={"a": 3, "c": 0, "b": 1})
    dataset, frame = _draw(mix, 2**16)
    np.testing.assert_allclose(np.bincount(dataset, minlength=3) / 2**16, [0.75, 0.25, 0])
    counts = np.bincount(frame[dataset == 1])
    assert counts.max() - counts.min() <= 1  # each used up before it starts over


def test_balance_gives_tasks_equal_shares(demo_path):
    demo = open_demo(demo_path)
    mix = Mix(datasets={"demo": demo}, balance="task")
    _, frame = _draw(mix, 2**16)
    tasks = demo.metadata("task")[demo.episode_of(frame)]
    for task in sorted(set(tasks)):
        assert (tasks == task).mean() == pytest.approx(1 / 3, abs=1e-4)
        frames = frame[tasks == task]
        own = sum(n for i, n in enumerate(LENGTHS) if f"task {i % 3}" == task)
        assert len(set(frames.tolist())) == own
        counts = np.unique_counts(frames).counts
        assert counts.max() - counts.min() <= 1


def test_refusals(demo):
    with pytest.raises(ValueError, match="expected at least one dataset"):
        Mix(datasets={})
    with pytest.raises(ValueError, match="the mix has no 'dmo'; did you mean 'demo'"):
        Mix(datasets={"demo": demo}, weights={"dmo": 1})
    with pytest.raises(ValueError, match=r"a weight for every dataset, got none for \['b'\]"):
        Mix(datasets={"a": demo, "b": demo}, weights={"a": 1})
    with pytest.raises(ValueError, match="has no 'episode_metadata/tasks'; did you mean"):
        Mix(datasets={"demo": demo}, balance="tasks")
