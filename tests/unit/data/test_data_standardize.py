"""Rules on whole episodes: steps may go, images follow, results are kept and checked."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
from rlds_demo import KEYS, LENGTHS, open_demo

from pizero.data import RldsDataset, compute_statistics
from pizero.data import standardize as module
from pizero.data.standardize import Rule, Standard

READ = ("observation/state", "action", "language_instruction")


def every_second(episode, *, offset=0.0):
    rows = np.arange(0, len(episode["action"]), 2)
    return Standard(
        action=episode["action"][rows, :2] + offset,
        state=np.concatenate([episode["observation/state"]] * 2, axis=1)[rows],
        text=np.array([f"{t}!" for t in episode["language_instruction"]], object)[rows],
        rows=rows,
    )


def open_with(demo_path, rule, **changes) -> RldsDataset:
    keys = {"cameras": KEYS["cameras"], "horizon": 3, "standardize": rule} | changes
    return RldsDataset(path=demo_path, split="train", **keys)


def test_steps_go_and_images_follow(demo_path):
    data = open_with(demo_path, Rule(READ, every_second))
    assert data.lengths.tolist() == [(n + 1) // 2 for n in LENGTHS]
    assert (data.state_dim, data.action_dim) == (8, 2)
    sample = data.read(int(data.episode_starts[3]) + 1)  # step 2 of episode 3
    assert sample["images"]["corner"][0, 0].tolist() == [30, 20, 0]
    np.testing.assert_array_equal(sample["state"][0, :2], [3, 2])
    np.testing.assert_array_equal(sample["actions"][:, 1], [2.5, 4.5, 6.5])
    assert sample["text"] == "!"
    assert data.texts()[4] == "do task 1!"
    assert (
        len(open_with(demo_path, Rule(READ, every_second), frames=2).read(0)["images"]["corner"])
        == 2
    )
    found = compute_statistics(data)
    np.testing.assert_allclose(found["action"].mean, np.asarray(data.actions, float).mean(0))


def test_the_result_is_kept_and_made_anew_for_another_rule(demo_path, monkeypatch):
    made = []
    make = module._make
    monkeypatch.setattr(module, "_make", lambda *a: (made.append(a), make(*a)))
    rule = Rule(READ, partial(every_second, offset=7.0))
    for _ in range(2):
        assert open_with(demo_path, rule).actions[0, 0] == 7.5
    other = open_with(demo_path, Rule(READ, partial(every_second, offset=9.0)))
    assert (other.actions[0, 0], len(made)) == (9.5, 2)


def test_pickles_without_its_arrays(demo_path):
    data = open_with(demo_path, Rule(READ, every_second))
    expected = data.read(5)
    copy = pickle.loads(pickle.dumps(data._standard))
    assert len(pickle.dumps(copy)) < 1000
    np.testing.assert_array_equal(copy.action, data.action_table)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(data)).read(5)["state"], expected["state"]
    )


def test_keys_of_several_types_are_joined(demo_path):
    data = open_demo(
        demo_path, state=["observation/state", "observation/gripper"], action=["action", "reward"]
    )
    assert (data.state_dim, data.action_dim) == (5, 5)
    assert data.read(int(data.episode_starts[3]))["state"].tolist() == [[3, 0, 0, 0, 0.75]]
    flags = open_demo(demo_path, state="is_first")
    assert flags.states[:, 0].tolist() == [float(t == 0) for n in LENGTHS for t in range(n)]


def test_mistakes_of_a_rule_name_the_episode(demo_path):
    def rule(**changes):
        def function(episode):
            return Standard(
                **({"action": episode["action"]} | {k: f(episode) for k, f in changes.items()})
            )

        return Rule(("action",), function)

    for changes, message in [
        ({"state": lambda e: e["action"][1:]}, r"episode 0 of 5 steps: expected as many of all"),
        ({"action": lambda e: e["action"][1:]}, r"steps were dropped; expected increasing rows"),
        (
            {"rows": lambda e: np.arange(len(e["action"]))[::-1]},
            "expected as many of all|increasing rows",
        ),
        ({"rows": lambda e: np.arange(len(e["action"])) + 1}, "rows below 5"),
        ({"action": lambda e: e["nothing"]}, "standardising episode 0 of 5 steps: KeyError"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_with(demo_path, rule(**changes))
    with pytest.raises(ValueError, match="has no 'acton'; did you mean 'action'"):
        open_with(demo_path, Rule(("acton",), every_second))
    with pytest.raises(ValueError, match="either standardize or state and action keys, got both"):
        open_with(demo_path, Rule(READ, every_second), state="observation/state")


def test_several_cameras_and_texts_are_drawn(demo_path):
    data = open_demo(demo_path, cameras={"any": ["observation/corner", "observation/wrist"]})
    i = int(data.episode_starts[2])  # an episode without pictures of the wrist
    draws = ["any" in data.read(i, draw=d)["images"] for d in range(40)]
    assert 8 < sum(draws) < 32
    assert draws == ["any" in data.read(i, draw=d)["images"] for d in range(40)]
    assert "any" in data.read(i)["images"]


def test_octo_compat_marks_padding_one_action_late(demo_path):
    fixed, octo = open_demo(demo_path), open_demo(demo_path, octo_compat=True)
    i = int(fixed.episode_starts[3]) + 5  # step 5 of 7, horizon 4
    assert fixed.read(i)["action_is_pad"].tolist() == [False, False, True, True]
    assert octo.read(i)["action_is_pad"].tolist() == [False, False, False, True]


def test_stride_of_chunks_and_frames(demo_path):
    data = open_demo(demo_path, stride=2, frames=2)
    sample = data.read(int(data.episode_starts[7]) + 3)  # step 3 of 9
    assert sample["state"][:, 1].tolist() == [1, 3]
    assert sample["actions"][:, 1].tolist() == [3.5, 5.5, 7.5, 8.5]
    assert sample["action_is_pad"].tolist() == [False, False, False, True]
