"""What can be said of the Metaworld tasks without running them."""

from __future__ import annotations

import re
import sys
from importlib import metadata

import numpy as np
import pytest

from pizero.agent.env.metaworld import MetaworldSimulator, _seed
from pizero.agent.env.metaworld_experts import expert_for
from pizero.agent.env.metaworld_tasks import TASKS

CAMERA = {"position": [1, 0, 1], "target": [0, 0, 0], "fovy": 40}


def simulator(**changes):
    options = {
        "tasks": ["push"],
        "cameras": {"corner": CAMERA},
        "image_size": 8,
        "supersample": 1,
        "film_size": 8,
        "max_steps": 100,
    }
    return MetaworldSimulator(**(options | changes))


def test_no_sentence_fits_two_tasks():
    sentences = [s for task in TASKS.values() for s in task.sentences]
    assert len(set(sentences)) == len(sentences)
    assert all(4 <= len(task.sentences) <= 7 for task in TASKS.values())
    assert all(re.fullmatch(r"[a-z ]+", sentence) for sentence in sentences)


def test_seeds_never_coincide_between_pools_scenes_and_starts():
    scenes = {task.scene for task in TASKS.values()}
    starts = range(300)
    seeds = {_seed("start", p, s, str(i)) for p in ("demo", "eval") for s in scenes for i in starts}
    assert len(seeds) == 2 * len(scenes) * len(starts)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"unknown task 'pusch' .did you mean 'push'"):
        simulator(tasks=["pusch"])
    with pytest.raises(ValueError, match=r"max_steps must be 1..100.*got 101"):
        simulator(max_steps=101)
    with pytest.raises(ValueError, match="at least one camera"):
        simulator(cameras={})
    with pytest.raises(ValueError, match="at most 2 cameras can be on the hand, got 3"):
        simulator(cameras={name: CAMERA | {"on_hand": True} for name in "abc"})
    with pytest.raises(ValueError, match="unknown task 'reach'"):
        simulator().reset(task="reach", start=0)
    with pytest.raises(ValueError, match=r"unknown pool 'evel' .did you mean 'eval'"):
        simulator().reset(task="push", start=0, pool="evel")
    with pytest.raises(ValueError, match="reset comes before run"):
        simulator().run(actions=np.zeros((1, 4)))


def test_without_metaworld(monkeypatch):
    monkeypatch.setattr(metadata.Distribution, "discover", lambda **_: iter(()))
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    message = r"Metaworld is not installed in .*: pip install 'pizero\[metaworld\]'"
    with pytest.raises(ValueError, match=message):
        simulator().describe()
    with pytest.raises(ValueError, match=message):
        simulator().reset(task="push", start=0)


@pytest.mark.parametrize("task", ["push", "pick-place", "button-press", "drawer-close", "reach"])
def test_labels_are_bounded_and_hardly_change_with_the_state(task):
    """A funnel, not a switch: a millimetre beside the same state gives nearly the same label."""
    random = np.random.default_rng(0)
    expert = expert_for(task)
    for _ in range(200):
        state = np.zeros(39)
        state[:3] = random.uniform((-0.1, 0.5, 0.05), (0.1, 0.8, 0.25))
        state[3] = 1.0  # open: whether the puck is held is a matter of fact, not of degree
        state[4:7] = random.uniform((-0.1, 0.6, 0.02), (0.1, 0.7, 0.02))
        state[36:39] = random.uniform((-0.1, 0.8, 0.02), (0.1, 0.9, 0.3))
        label, calm = expert(state)
        assert np.abs(label).max() <= 1.0
        assert 0.0 <= calm <= 1.0
        state[:3] += random.uniform(-0.001, 0.001, 3)
        assert np.abs(expert(state)[0] - label).max() < 0.15
