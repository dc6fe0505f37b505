"""RLDS -> LeRobot v3.0 -> read: the same episodes; and what LeRobot wants to find in the files."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from rlds_demo import LENGTHS

from pizero.data import RldsDataset
from pizero.data.lerobot import LeRobotDataset, LeRobotWriter, export_episodes
from pizero.data.lerobot.describe import PixelCounts, describe_values
from pizero.data.lerobot.video import probe_video
from pizero.data.select import Filters

REPOSITORY = Path(__file__).parents[3]
CAMERAS = {"corner": "observation/corner", "wrist": "observation/wrist"}
FEATURES = {camera: f"observation.images.{camera}" for camera in CAMERAS}
AUTOMATIC = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def open_rlds(path: Path, split: str, **changes) -> RldsDataset:
    arguments = {
        "path": path,
        "split": split,
        "horizon": 4,
        "cameras": CAMERAS,
        "state": ["observation/state", "observation/gripper"],
        "action": "action",
        "text": "language_instruction",
    }
    return RldsDataset(**(arguments | changes))


def open_set(path: Path, **changes) -> LeRobotDataset:
    return LeRobotDataset(**({"path": path, "cameras": FEATURES, "horizon": 4} | changes))


@pytest.fixture(scope="module")
def rlds(demo_path) -> dict[str, RldsDataset]:
    return {split: open_rlds(demo_path, split) for split in ("train", "val")}


@pytest.fixture(scope="module", params=["video", "parquet"])
def path(request, rlds, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / request.param
    return export_episodes(rlds, folder, fps=5, images=request.param, crf=5)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_episodes_are_the_same(rlds, path, split):
    ours, theirs = open_set(path, split=split), rlds[split]
    assert (len(ours), ours.num_episodes) == (len(theirs), theirs.num_episodes)
    np.testing.assert_array_equal(ours.states, theirs.states)
    np.testing.assert_array_equal(ours.actions, theirs.actions)
    assert ours.texts() == theirs.texts()
    for key in ("task", "start", "success"):
        np.testing.assert_array_equal(ours.metadata(key), theirs.metadata(key))
    tolerance = 0 if path.name == "parquet" else 6
    for i in range(len(theirs)):
        a, b = ours.read(i), theirs.read(i)
        assert [a[k] for k in ("text", "episode", "step")] == [
            b[k] for k in ("text", "episode", "step")
        ]
        np.testing.assert_array_equal(a["actions"], b["actions"])
        np.testing.assert_array_equal(a["action_is_pad"], b["action_is_pad"])
        for camera in CAMERAS:
            expected = b["images"].get(camera, np.zeros_like(a["images"][camera]))
            difference = np.abs(a["images"][camera].astype(int) - expected)
            assert difference.mean() <= tolerance, (camera, i)


def test_a_missing_camera_is_black_and_counted(rlds, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        export_episodes({"train": rlds["train"]}, tmp_path / "set", fps=5)
    assert "2 frames lack a picture of wrist and are black there" in caplog.text


def test_files_are_as_lerobot_wants_them(path):
    info = json.loads((path / "meta/info.json").read_text())
    total = 2 * sum(LENGTHS)
    assert (info["codebase_version"], info["fps"], info["total_frames"]) == ("v3.0", 5, total)
    assert info["splits"] == {"train": "0:8", "val": "8:16"}
    assert info["total_tasks"] == 4
    kind = "video" if path.name == "video" else "image"
    assert list(info["features"]) == [*FEATURES.values(), "observation.state", "action", *AUTOMATIC]
    assert {info["features"][key]["dtype"] for key in FEATURES.values()} == {kind}
    table = pq.read_table(path / "data/chunk-000/file-000.parquet")
    assert table.num_rows == total
    assert ("observation.images.wrist" in table.column_names) == (kind == "image")
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds["action"] == "fixed_size_list<element: float>[4]"
    assert [kinds[key] for key in AUTOMATIC] == ["float", "int64", "int64", "int64", "int64"]
    described = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert described["action"]["length"] == 4
    tasks = pq.read_table(path / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert tasks.column("task").to_pylist() == ["do task 0", "do task 1", "do task 2", ""]
    rows = pq.read_table(path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["length"] for row in rows] == [*LENGTHS, *LENGTHS]
    first = 0
    for row in rows:
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (
            first,
            first + row["length"],
        )
        assert row["tasks"] == [row["tasks"][0]]
        if kind == "video":
            begin, end = (row[f"videos/{FEATURES['wrist']}/{k}_timestamp"] for k in ("from", "to"))
            assert (begin, end) == (first / 5, (first + row["length"]) / 5)
        first += row["length"]
    if kind == "video":
        facts = probe_video(path / "videos/observation.images.wrist/chunk-000/file-000.mp4")
        assert (facts.frames, facts.fps, facts.gop, facts.codec) == (total, 5, 2, "av1")
        assert info["features"][FEATURES["wrist"]]["info"]["video.codec"] == "av1"
    for file in path.rglob("*"):
        if ".pizero_index" not in file.parts:
            assert file.stat().st_mode & 0o777 == (0o755 if file.is_dir() else 0o644)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True)


def test_statistics(rlds, path):
    whole = json.loads((path / "meta/stats.json").read_text())
    rows = pq.read_table(path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    actions = np.concatenate([rlds["train"].actions, rlds["val"].actions]).astype(np.float64)
    pictures = (
        np.stack([rlds["train"].read(i)["images"]["corner"] for i in range(LENGTHS[0])]) / 255
    )
    for found, values in (
        (whole["action"], actions),
        ({k: rows[3][f"stats/action/{k}"] for k in whole["action"]}, rlds["train"].actions[8:15]),
    ):
        assert found["count"] == [len(values)]
        for name in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(found[name], getattr(values, name)(0), rtol=1e-6)
        for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
            np.testing.assert_allclose(found[name], np.quantile(values, q, axis=0), rtol=1e-6)
    key = FEATURES["corner"]
    for name in ("min", "max", "mean", "std"):
        expected = getattr(pictures, name)((0, 1, 2)).reshape(3, 1, 1)
        np.testing.assert_allclose(rows[0][f"stats/{key}/{name}"], expected, atol=1e-9)
    assert rows[0][f"stats/{key}/count"] == [LENGTHS[0]]
    assert set(whole) == {*FEATURES.values(), "observation.state", "action", *AUTOMATIC}


def test_quantiles_of_pictures_are_exact():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 5, 7, 3)).astype(np.uint8) // [1, 2, 255]
    counts = PixelCounts()
    for image in images:
        counts.add(image)
    found = counts.describe()
    for name, q in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        expected = np.quantile(images.reshape(-1, 3) / 255, q, axis=0)
        np.testing.assert_allclose(np.reshape(found[name], 3), expected, atol=1e-12)
    assert describe_values(np.array([1, 2, 4]))["q50"] == [2]


def frames(count: int, size: int = 16, cameras: tuple[str, ...] = ("front",)):
    rng = np.random.default_rng(count)
    for _ in range(count):
        yield {camera: rng.integers(0, 256, (size, size, 3), np.uint8) for camera in cameras}


def add(writer: LeRobotWriter, length: int = 3, **changes) -> None:
    arguments = {"actions": np.ones((length, 2)), "text": "go", "frames": frames(length)}
    arguments |= changes
    writer.add_episode(arguments.pop("frames"), **arguments)


@pytest.mark.parametrize("images", ["video", "parquet"])
def test_files_are_of_bounded_size(tmp_path, images):
    with LeRobotWriter(tmp_path / "set", fps=10, images=images, data_mb=0, video_mb=0) as writer:
        for episode in range(3):
            add(writer, 2 + episode, text=[f"a {episode}"] * 2 + ["b"] * episode)
        path = writer.finish({"train": 2, "val": 1})
    assert len(list(path.glob("data/chunk-000/file-*.parquet"))) == 3
    assert len(list(path.glob("videos/*/chunk-000/file-*.mp4"))) == (3 if images == "video" else 0)
    data = open_set(path, split="val", state=None, cameras={"front": "observation.images.front"})
    assert [data.read(i)["text"] for i in range(4)] == ["a 2", "a 2", "b", "b"]
    expected = next(frames(4))["front"]
    if images == "parquet":
        np.testing.assert_array_equal(data.read(0)["images"]["front"], expected)


def test_without_cameras_and_with_one_number(tmp_path):
    with LeRobotWriter(tmp_path / "set", fps=10) as writer:
        actions = np.arange(3, dtype=np.float32)[:, None]
        add(writer, frames=[{}] * 3, actions=actions, state=actions + 1)
        path = writer.finish()
    data = open_set(path, cameras={})
    np.testing.assert_array_equal(data.actions[:, 0], [0, 1, 2])
    np.testing.assert_array_equal(data.states[:, 0], [1, 2, 3])
    column = pq.read_table(path / "data/chunk-000/file-000.parquet").column("action")
    assert str(column.type) == "float"  # as LeRobot has it


def test_what_is_refused(tmp_path):
    place = tmp_path / "set"
    with pytest.raises(ValueError, match=r"expected fps as a whole number, .* got 7\.5"):
        LeRobotWriter(place, fps=7.5)
    with pytest.raises(ValueError, match="expected images video or parquet, got 'png'"):
        LeRobotWriter(place, fps=5, images="png")
    with LeRobotWriter(place, fps=5) as writer:
        with pytest.raises(ValueError, match="being written by another process"):
            LeRobotWriter(place, fps=5)
        with pytest.raises(ValueError, match="all 0 episodes, at least one"):
            writer.finish()
        add(writer)
        for changes, message in (
            ({"actions": np.ones((3, 4))}, r"episode 1: expected action \[2\] as before, .*\[4\]"),
            ({"actions": np.ones(3)}, r"episode 1: expected action as \[T d\], got \[3\]"),
            (
                {"state": np.ones((3, 4))},
                r"expected action \[2\] as before, got .*observation\.state",
            ),
            ({"state": np.ones((2, 4))}, "expected 3 steps of observation.state, got 2"),
            ({"text": ["go"] * 2}, "episode 1: expected 3 steps of text, got 2"),
            ({"frames": frames(2)}, "episode 1: expected 3 steps of pictures, got 2"),
            ({"frames": frames(3, 24)}, r"front \[16, 16, 3\] as before, got .*\[24, 24, 3\]"),
            (
                {"frames": frames(3, cameras=("top",))},
                r"images\.front .* got observation\.images\.top",
            ),
            ({"actions": np.ones((0, 2)), "text": []}, "expected some steps of action, got 0"),
        ):
            with pytest.raises(ValueError, match=message):
                add(writer, **changes)
    assert not list(tmp_path.iterdir())  # without finish nothing is left
    with (
        LeRobotWriter(place, fps=5) as writer,
        pytest.raises(ValueError, match=r"even height and width.*images='parquet'"),
    ):
        add(writer, frames=frames(3, 15))


def test_an_existing_set_is_kept_unless_told(tmp_path):
    for number in range(2):
        with LeRobotWriter(tmp_path / "set", fps=5 + number, overwrite=number == 1) as writer:
            add(writer)
            writer.finish()
    assert json.loads((tmp_path / "set/meta/info.json").read_text())["fps"] == 6
    with pytest.raises(ValueError, match="exists already"):
        LeRobotWriter(tmp_path / "set", fps=5)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_killed_writer_is_started_over(tmp_path, caplog):
    code = (
        "import os, numpy as np\n"
        "from pizero.data.lerobot import LeRobotWriter\n"
        f"writer = LeRobotWriter({str(tmp_path / 'set')!r}, fps=5)\n"
        "images = [{'front': np.zeros((16, 16, 3), np.uint8)}] * 3\n"
        "writer.add_episode(images, actions=np.ones((3, 2)), text='go')\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert not (tmp_path / "set").exists()
    assert (tmp_path / ".set.writing").exists()
    with (
        caplog.at_level(logging.WARNING),
        LeRobotWriter(tmp_path / "set", fps=5) as writer,
    ):
        add(writer)
        assert len(open_set(writer.finish(), cameras={}, state=None)) == 3
    assert "starting over" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_only_whole_episodes_are_written(demo_path, tmp_path):
    some = open_rlds(demo_path, "train", filters=Filters(max_frames=1))
    with pytest.raises(
        ValueError, match="train: expected whole episodes without history, got 8 of"
    ):
        export_episodes({"train": some}, tmp_path / "set", fps=5)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reencoding_a_set(rlds, tmp_path, capsys):
    path = export_episodes({"train": rlds["train"]}, tmp_path / "set", fps=5, codec="h264", gop=30)
    before = [open_set(path).read(i)["images"]["corner"] for i in range(5)]
    reencode = script("reencode_videos").main
    reencode([str(path), "--codec", "av1", "--crf", "10"])
    assert "2 videos" in capsys.readouterr().out
    reencode([str(path), "--codec", "av1"])
    assert "0 videos" in capsys.readouterr().out
    info = json.loads((path / "meta/info.json").read_text())
    assert info["features"][FEATURES["wrist"]]["info"]["video.codec"] == "av1"
    data = open_set(path)  # its checksums agree
    assert data.index.facts["gop"] == {key: 2 for key in FEATURES.values()}
    for i, image in enumerate(before):
        difference = np.abs(data.read(i)["images"]["corner"].astype(int) - image)
        assert difference.mean() < 8
    file = path / "videos/observation.images.wrist/chunk-000/file-000.mp4"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(SystemExit, match=r"1 videos stay .*\n.*file-000\.mp4: expected SHA-256"):
        reencode([str(path), "--codec", "h264"])
    (path / "SHA256SUMS").unlink()
    with pytest.raises(SystemExit, match=r"1 videos stay .*\n.*file-000\.mp4: the file ends early"):
        reencode([str(path), "--codec", "h264"])
    with pytest.raises(SystemExit, match="no LeRobot data set"):
        reencode([str(tmp_path / "nowhere")])


def test_the_command_converts(demo_path, tmp_path, capsys):
    convert = script("rlds_to_lerobot").main
    arguments = [str(demo_path), str(tmp_path / "set"), "--images", "parquet"]
    with pytest.raises(SystemExit, match="expected --fps"):
        convert(arguments)
    convert([*arguments, "--fps", "5", "--camera", "base=observation/corner"])
    assert "val: 8 episodes, 37 frames" in capsys.readouterr().out
    data = open_set(tmp_path / "set", split="val", cameras={"b": "observation.images.base"})
    assert data.metadata("task")[:2].tolist() == ["task 0", "task 1"]
    np.testing.assert_array_equal(data.read(0)["images"]["b"][5, 5], [0, 0, 0])
    np.testing.assert_array_equal(data.read(6)["images"]["b"][5, 5], [20, 0, 0])
    with pytest.raises(SystemExit, match="exists already"):
        convert([*arguments, "--fps", "5"])
    convert([*arguments, "--fps", "5", "--splits", "train[:2]", "--overwrite"])
    assert open_set(tmp_path / "set", cameras={}).num_episodes == 2
    with pytest.raises(SystemExit, match="did you mean 'observation/corner'"):
        convert([*arguments, "--fps", "5", "--overwrite", "--camera", "b=observation/cornr"])
