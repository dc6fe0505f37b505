"""Statistics from the command line: numpy's, in every dialect, with warnings where they mislead."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rlds_demo import FEATURES, LENGTHS, episode_steps, write_demo

from pizero.agent import compute_stats
from pizero.data import RldsWriter, load_statistics
from pizero.data.stats import DIALECTS, statistics_names

ALL = ("mean", "std", "min", "max", "q01", "q99")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo"))


def rows(numbers=tuple(range(8))) -> np.ndarray:
    """The states of the demo, float64 [n 4]; its actions are larger by 0.5."""
    steps = [episode_steps(n, LENGTHS[n])["observation"]["state"] for n in numbers]
    return np.concatenate(steps).astype(np.float64)


def run(*words: object) -> None:
    compute_stats.main([str(word) for word in words])


def check(found, values: np.ndarray, entries=ALL, rtol=1e-7) -> None:
    expected = {
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }
    for name in entries:
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_every_dialect_gives_numpys_numbers(dialect, demo, tmp_path):
    path = tmp_path / ("s.safetensors" if dialect == "lerobot_processor" else "s.json")
    run(demo, "--output", path, "--dialect", dialect)
    found = load_statistics(path)
    check(found["state"], rows(), DIALECTS[dialect].entries, rtol=1e-6)
    check(found["action"], rows() + 0.5, DIALECTS[dialect].entries, rtol=1e-6)


def test_the_training_split_only_unless_told(tmp_path):
    """The split val has other episodes, which must not be seen."""
    with RldsWriter(tmp_path / "set", name="demo", features=FEATURES) as writer:
        for split, number in (("train", 3), ("train", 5), ("val", 7)):
            metadata = {"task": "", "start": 0, "success": True}
            steps = episode_steps(number, LENGTHS[number])
            writer.add_episode(split, steps, metadata, key=str(number))
        folder = writer.finish()
    run(folder, "--output", tmp_path / "train.json")
    check(load_statistics(tmp_path / "train.json")["state"], rows([3, 5]))
    run(folder, "--output", tmp_path / "all.json", "--all-splits")
    check(load_statistics(tmp_path / "all.json")["state"], rows([3, 5, 7]))
    run(folder, "--output", tmp_path / "val.json", "--split", "val")
    check(load_statistics(tmp_path / "val.json")["state"], rows([7]))


def test_deltas_are_relative_to_the_state(demo, tmp_path):
    """The action `ahead` steps later minus the state now is 0.5 + ahead in the second dimension."""
    run(demo, "--output", tmp_path / "s.json", "--delta-mask", "2*true,false", "--horizon", 4)
    found = load_statistics(tmp_path / "s.json")["action"]
    ahead = [a for length in LENGTHS for t in range(length) for a in range(min(4, length - t))]
    np.testing.assert_allclose(found.mean[1], 0.5 + np.mean(ahead))
    np.testing.assert_allclose(found.max[:3], [0.5, 3.5, 0.5])
    assert found.count == len(ahead)


def test_hardly_moving_dimensions_are_named(tmp_path, capsys):
    with RldsWriter(tmp_path, name="demo", features=FEATURES, splits=("train",)) as writer:
        for number in range(3):
            steps = episode_steps(number, 100)
            steps["observation"]["state"][:, 3] = 5e-7 * np.arange(100)
            steps["action"] = steps["observation"]["state"] + 0.5
            steps["action"][:, 3] = [number == 1 and step == 50 for step in range(100)]
            writer.add_episode("train", steps, {"task": "", "start": 0, "success": True})
        folder = writer.finish()
    run(folder, "--output", tmp_path / "s.json")
    said = " ".join(capsys.readouterr().out.split())
    assert "state dimension 2 (state 2) is constant" in said
    assert "state dimension 3 (state 3) is nearly constant" in said
    assert "action dimension 3 (action 3) is the same in 98 % of the frames (q01 = q99)" in said
    assert "dimension 1" not in said
    assert "300 frames in" in said


def test_mixtures_have_statistics_of_each_or_together(toy_data, tmp_path):
    config = ("--config-name", "train_toy", f"data.path={toy_data}")
    config += ("+data.train.datasets.held_out=${data.val}",)
    each, pooled = tmp_path / "each.json", tmp_path / "pooled.json"
    run(*config, "--output", each)
    assert statistics_names(each) == ["demonstrations", "held_out"]
    run(*config, "--output", pooled, "--together")
    parts = [load_statistics(each, dataset=name)["action"] for name in statistics_names(each)]
    together = load_statistics(pooled)["action"]
    assert together.count == sum(part.count for part in parts)
    mean = sum(part.count * part.mean for part in parts) / together.count
    np.testing.assert_allclose(together.mean, mean)
    np.testing.assert_array_equal(together.max, np.max([part.max for part in parts], axis=0))
    run(toy_data, "--output", tmp_path / "alone.json")
    np.testing.assert_array_equal(
        load_statistics(tmp_path / "alone.json")["action"].q99, parts[0].q99
    )


def test_several_data_sets_in_one_file_or_in_several(demo, tmp_path):
    run(demo, "--output", tmp_path / "one.json")
    found = {name: load_statistics(tmp_path / "one.json") for name in ("a", "b")}
    (path,) = compute_stats.write(found, tmp_path / "both.json")
    assert statistics_names(path) == ["a", "b"]
    check(load_statistics(path, dataset="b")["state"], rows())
    files = compute_stats.write(found, tmp_path / "octo.json", dialect="octo")
    assert [f.name for f in files] == ["octo-a.json", "octo-b.json"]
    assert "proprio" in json.loads(files[0].read_text())


def test_robot_gives_names_and_maps(tmp_path, capsys):
    robot = tmp_path / "arm.yaml"
    robot.write_text(
        """
_target_: pizero.data.robot.Robot
name: arm
cameras: {corner: null}
state: {state: [x, y, z, hand]}
action: [x, y, z, hand]
units: {"*": m}
rotation: null
control_hz: 5.0
horizon: 4
replan: 2
resize: lanczos
action_maps:
  - {_target_: pizero.data.maps.Affine, dims: [3], scale: -1.0, offset: 1.0}
"""
    )
    run(write_demo(tmp_path / "set"), "--output", tmp_path / "s.json", "--robot", robot)
    found = load_statistics(tmp_path / "s.json")["action"]
    values = rows() + 0.5
    values[:, 3] = 1 - values[:, 3]
    check(found, values)
    assert "state dimension 3 (hand) is constant" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--delta-mask", "yes"], "expected --delta-mask true or false for each dimension"),
        (["--delta-mask", "9*true"], "delta_mask has 9 entries"),
        (["--split", "trian"], "'trian'; did you mean 'train'?"),
        (["--all-splits", "--split", "val"], "--all-splits goes with"),
    ],
)
def test_mistakes_are_one_message(words, expected, demo, tmp_path):
    output = tmp_path / "s.json"
    with pytest.raises(SystemExit) as stop:
        run(demo, "--output", output, *words)
    assert expected in str(stop.value)
    assert not output.exists()
