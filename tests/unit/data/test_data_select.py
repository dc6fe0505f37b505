"""Filters: which episodes and frames are drawn, with true lengths and whole action chunks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rlds_demo import LENGTHS, open_demo

from pizero.data import Mix, compute_statistics
from pizero.data.select import Filters


def test_episodes_by_text_size_and_length(demo_path):
    data = open_demo(demo_path, filters=Filters(matching={"task": "task [01]"}))
    assert data.episodes.tolist() == [0, 1, 3, 4, 6, 7]
    # Actions of episode n start at [n + 0.5, ...]; step 8.5 of the last one is the largest.
    data = open_demo(demo_path, filters=Filters(max_action=[5.0, np.inf, 9, 9]))
    assert data.episodes.tolist() == [0, 1, 2, 3, 4]
    assert open_demo(demo_path, filters=Filters(max_state=6)).episodes.tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert open_demo(demo_path, filters=Filters(min_steps=6)).episodes.tolist() == [3, 5, 7]


def test_ranges_keep_frames_and_whole_chunks(demo_path, tmp_path):
    path = tmp_path / "ranges.json"
    path.write_text(
        json.dumps({"task 0/-3": [[1, 3], [5, 99]], "task 1/-7": [[0, 1]], "x": [[0, 9]]})
    )
    filters = Filters(ranges=path, ranges_name="{task}/{start}")
    data = open_demo(demo_path, filters=filters)
    found = [tuple(data.read(i)["state"][0, :2].astype(int).tolist()) for i in range(len(data))]
    assert found == [(3, 1), (3, 2), (3, 5), (3, 6), (7, 0)]
    assert data.episode_lengths.tolist() == [0, 0, 0, 4, 0, 0, 0, 1]
    np.testing.assert_array_equal(data.states[:, 1], [1, 2, 5, 6, 0])
    np.testing.assert_array_equal(data.steps_left, [5, 4, 1, 0, 8])
    # The chunk goes on over frames that are not drawn.
    np.testing.assert_array_equal(data.read(1)["actions"][:, 1], [2.5, 3.5, 4.5, 5.5])
    assert data.read(2)["action_is_pad"].tolist() == [False, False, True, True]
    _, frame = Mix(datasets={"a": data}).locate(Mix(datasets={"a": data}).order(0), np.arange(5))
    assert sorted(frame.tolist()) == list(range(5))
    stats = compute_statistics(data)
    np.testing.assert_allclose(stats["state"].mean[1], np.mean([1, 2, 5, 6, 0]))
    stats = compute_statistics(data, delta_mask=[True])
    assert stats["action"].count == 5 + 4 + 3 + 3  # chunk places that lie within the episode
    with pytest.raises(ValueError, match=r"names none of the 8 episodes; .*it has 'task 0/-3'"):
        open_demo(demo_path, filters=Filters(ranges=path, ranges_name="{task}"))
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"ranges.json: expected JSON \{episode: "):
        open_demo(demo_path, filters=filters)


def test_idle_beginnings_are_left_out(demo_path):
    # Actions grow by one a step, so only where the last one is repeated does nothing move.
    data = open_demo(demo_path, filters=Filters(idle=1e-3))
    assert data.episode_lengths.tolist() == [n - 1 for n in LENGTHS if n > 0]
    assert len(open_demo(demo_path, filters=Filters(idle=1e-3, idle_from_zero=True))) == sum(
        LENGTHS
    )


def test_at_most_so_many_frames_of_an_episode(demo_path):
    data = open_demo(demo_path, filters=Filters(max_frames=3))
    assert data.episode_lengths.tolist() == [min(n, 3) for n in LENGTHS]
    again = open_demo(demo_path, filters=Filters(max_frames=3))
    np.testing.assert_array_equal(data.states, again.states)
    both = open_demo(demo_path, filters=Filters(max_frames=3, idle=1e-3))
    assert both.episode_lengths.tolist() == [min(n - 1, 3) for n in LENGTHS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matching": {"task": "("}}, r"expected a regular expression, got '\('"),
        ({"ranges": "x.json"}, "expected ranges and ranges_name together"),
        ({"max_frames": 0}, "expected max_frames >= 1, got 0"),
        ({"max_action": [1.0, 2.0]}, r"expected max_action of 4 entries, got \[1.0, 2.0\]"),
        ({"matching": {"tsk": "x"}}, "has no 'episode_metadata/tsk'; did you mean"),
        ({"min_steps": 100}, "no episode of 'train' in .* is selected"),
    ],
)
def test_refusals(demo_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_demo(demo_path, filters=Filters(**arguments))
