"""What a LeRobot set says twice must agree; else the error names file, place and both values."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parity.lerobot_sets import LENGTHS

from pizero.data.lerobot import LeRobotDataset
from pizero.data.lerobot.cameras import first_frames
from pizero.data.lerobot.rows import check_statistics
from pizero.data.lerobot.video import VideoFacts

SETS = Path(__file__).parents[2] / "data" / "lerobot"
FRONT = "observation.images.front"
DATA_21 = "data/chunk-000/episode_000001.parquet"
DATA_30 = "data/chunk-000/file-000.parquet"
EPISODES_30 = "meta/episodes/chunk-000/file-000.parquet"


def open_set(path: Path, **changes) -> LeRobotDataset:
    arguments = {"path": path, "cameras": {"front": FRONT}, "horizon": 4}
    return LeRobotDataset(**(arguments | changes))


@pytest.fixture
def v21(tmp_path) -> Path:
    return shutil.copytree(SETS / "v21", tmp_path / "v21")


@pytest.fixture
def v30(tmp_path) -> Path:
    return shutil.copytree(SETS / "v30", tmp_path / "v30")


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def edit_line(path: Path, line: int, **changes) -> None:
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    rows[line] |= changes
    path.write_text("\n".join(map(json.dumps, rows)))


def edit_table(path: Path, key: str, change: Callable[[list], Any]) -> None:
    table = pq.read_table(path)
    values = table.column(key).to_pylist()
    values = change(values) or values
    column = pa.array(values, table.schema.field(key).type)
    pq.write_table(table.set_column(table.column_names.index(key), key, column), path)


def put(row: int, value: Any) -> Callable[[list], None]:
    def change(values: list) -> None:
        values[row] = value

    return change


def test_info(v21):
    info = v21 / "meta/info.json"
    for change, message in (
        (
            {"codebase_version": "v1.6"},
            r"info\.json: expected codebase_version v2\.0, .*got 'v1\.6'",
        ),
        ({"total_frames": 21}, r"info\.json: total_frames is 21, but meta/episodes has 20"),
        ({"total_episodes": 4}, r"total_episodes is 4, but meta/episodes has 3"),
        (
            {"fps": 12},
            r"row 1: expected timestamp 0\.083333 for frame 1 at 12 frames .*got 0\.100000",
        ),
        ({"fps": 0}, r"expected fps > 0, got 0"),
        ({"fps": "10"}, r"fps: expected int or float, got '10'"),
        (
            {"data_path": "data/{chunk}.parquet"},
            r"info\.json: expected a path with \{episode_chunk\}",
        ),
        ({"data_path": "d/{episode_index}.parquet"}, r"d/0\.parquet: there is no such file"),
        ({"splits": {"train": "0:7"}}, r"expected split 'train' as FIRST:LAST of 3 episodes"),
        ({"features": {"action": {"dtype": "float3"}}}, r"dtypes, has no 'float3'; did you mean"),
        ({"features": {}}, r"features, has no 'episode_index'"),
    ):
        shutil.copy(SETS / "v21/meta/info.json", info)
        edit_json(info, lambda tree, change=change: tree.update(change))
        with pytest.raises(ValueError, match=message):
            open_set(v21)
    info.write_text("{")
    with pytest.raises(ValueError, match=r"info\.json: expected JSON"):
        open_set(v21)
    info.unlink()
    with pytest.raises(ValueError, match=r"there is no meta/info\.json in"):
        open_set(v21)


def test_what_columns_hold(v21):
    info = v21 / "meta/info.json"

    def with_feature(key: str, **changes) -> None:
        shutil.copy(SETS / "v21/meta/info.json", info)
        edit_json(info, lambda tree: tree["features"].setdefault(key, {}).update(changes))

    for key, changes, message in (
        ("observation.state", {"shape": [5]}, r"state: expected shape \[5\] as in .*, got \[4\]"),
        ("observation.state", {"dtype": "int64"}, r"state: expected int64 as in .*, got float32"),
        ("phase", {"dtype": "float32"}, r"phase: expected float32"),
        ("reward", {"dtype": "float32", "shape": [1]}, r"no 'reward'; did you mean 'next.reward'"),
    ):
        with_feature(key, **changes)
        with pytest.raises(ValueError, match=message):
            open_set(v21)
    with_feature("observation.state", dtype="float64")  # wider is no loss
    assert open_set(v21).states.dtype == np.float32


def test_episodes_of_version_2(v21):
    path = v21 / "meta/episodes.jsonl"
    for changes, message in (
        ({"length": 5}, r"total_frames is 20, but meta/episodes has 21"),
        ({"length": "4"}, r"episodes\.jsonl, line 2, length: expected int, got '4'"),
        ({"episode_index": 0}, r"expected episodes .* numbered upwards, got numbers 0, 0, 2"),
        (
            {"tasks": ["stack three cups"]},
            r"'stack two cups' by meta/tasks, but .*lists \['stack th",
        ),
    ):
        shutil.copy(SETS / "v21/meta/episodes.jsonl", path)
        edit_line(path, 1, **changes)
        with pytest.raises(ValueError, match=message):
            open_set(v21)
    path.write_text('{"episode_index": 0, "tasks"')
    with pytest.raises(ValueError, match=r"episodes\.jsonl, line 1: expected JSON"):
        open_set(v21)


def test_lengths_against_rows(v21):
    edit_line(v21 / "meta/episodes.jsonl", 0, length=8)
    edit_line(v21 / "meta/episodes.jsonl", 1, length=3)
    with pytest.raises(ValueError, match=r"episode_000000\.parquet: expected 8 rows, .*got 7"):
        open_set(v21)


@pytest.mark.parametrize(
    ("key", "row", "value", "message"),
    [
        ("frame_index", 2, 3, r"row 2: expected frame_index 2, got 3"),
        ("episode_index", 3, 0, r"row 3: expected episode_index 1, got 0"),
        ("timestamp", 2, 0.2002, r"row 2: expected timestamp 0\.200000 .*got 0\.200200"),
        ("task_index", 1, 9, r"row 1: expected task_index among those in meta/tasks \(2\), got 9"),
        ("action", 1, None, r"action: expected a value in every row, 1 have none"),
        (
            "action",
            1,
            [0.5, 0.5, 40.0],
            r"episode 1, action: expected .* as the max of dimension 2",
        ),
        ("observation.state", 2, [1, 2, 0.08, 0], r"episode 1, observation\.state: expected"),
        ("phase", 2, None, r"phase: expected a value in every row"),
        (
            "observation.images.wrist",
            3,
            None,
            r"wrist, row 3: expected an image with bytes or a path",
        ),
    ],
)
def test_values_of_rows(v21, key, row, value, message):
    edit_table(v21 / DATA_21, key, put(row, value))
    with pytest.raises(ValueError, match=f"episode_000001.parquet, .*{message}|{message}"):
        open_set(v21)


def test_tolerance_is_an_argument(v21):
    edit_table(v21 / DATA_21, "timestamp", put(2, 0.2002))
    assert len(open_set(v21, tolerance_s=1e-3)) == sum(LENGTHS)


def test_statistics_need_not_be_compared(v21):
    edit_table(v21 / DATA_21, "action", put(1, [0.5, 0.5, 40.0]))
    assert open_set(v21, verify=False).actions.max() == 40


def test_statistics_of_many_episodes():
    rng = np.random.default_rng(0)
    lengths = np.array([5, 40, 3])
    values = rng.normal(3, 1, (48, 2)).astype(np.float32)
    pieces = np.split(values, np.cumsum(lengths)[:-1])
    recorded = {
        "min": np.stack([p.min(0) for p in pieces]),
        "max": np.stack([p.max(0) for p in pieces]),
        "mean": np.stack([p.mean(0) for p in pieces]),  # in float32, as LeRobot does
        "std": np.stack([np.sqrt((p**2).mean(0) - p.mean(0) ** 2) for p in pieces]),
        "count": lengths[:, None],
    }
    recorded = {name: array.astype(np.float64) for name, array in recorded.items()}
    names = ["a", "b", "c"]
    check_statistics(values, lengths, recorded, names)
    check_statistics(values, lengths, {"mean": np.zeros((3, 7))}, names)  # not comparable
    for row, episode in ((0, "a"), (30, "b"), (47, "c")):
        changed = values.copy()
        changed[row, 1] += 0.01
        with pytest.raises(ValueError, match=rf"{episode}: expected .* of dimension 1, got"):
            check_statistics(changed, lengths, recorded, names)
    silent = values.copy()
    silent[:] = np.nan
    with pytest.raises(ValueError, match="got nan"):
        check_statistics(silent, lengths, recorded, names)


def test_long_episodes_have_times_that_float32_cannot_hold(v21):
    """At 30 minutes neighbouring float32 are 1.2e-4 s apart, more than LeRobot's tolerance."""
    from pizero.data.lerobot.rows import Layout, Part, _check_rows

    length = 30 * 60 * 50
    part = Part("x", np.array([0]), np.array([length]), [[]], None, {})
    tables = {
        "episode_index": np.zeros(length, int),
        "frame_index": np.arange(length),
        "timestamp": (np.arange(length) / 50).astype(np.float32),
        "task_index": np.zeros(length, int),
    }
    layout = Layout(v21, 50, {}, {}, 1e-4, True)
    _check_rows(Path("x"), layout, part, tables)
    tables["timestamp"][-5:] += 0.01
    with pytest.raises(ValueError, match=f"row {length - 5}: expected timestamp"):
        _check_rows(Path("x"), layout, part, tables)


def test_episodes_of_version_3(v30):
    path = v30 / EPISODES_30
    for key, row, value, message in (
        ("dataset_to_index", 1, 12, r"episode 1: 4 frames, but .* is 7:12"),
        ("length", 1, 5, r"episode 1: 5 frames, but dataset_from_index:dataset_to_index is 7:11"),
        ("data/file_index", 2, 3, r"data/chunk-000/file-000\.parquet: expected 11 rows, .*got 20"),
        (f"videos/{FRONT}/file_index", 2, 1, r"1 of 3 episodes lack .*file-001\.mp4: there is no"),
        (f"videos/{FRONT}/from_timestamp", 1, 1.1, r"has 20 frames, its 3 episodes 20; .*frame 11"),
        ("episode_index", 1, None, r"meta/episodes, episode_index: expected int, got None"),
    ):
        shutil.copy(SETS / "v30" / EPISODES_30, path)
        edit_table(path, key, put(row, value))
        with pytest.raises(ValueError, match=message):
            open_set(v30)
    shutil.copy(SETS / "v30" / EPISODES_30, path)
    edit_table(v30 / DATA_30, "index", put(8, 7))
    with pytest.raises(ValueError, match=r"file-000\.parquet, row 8: expected index 8, got 7"):
        open_set(v30)
    shutil.copy(SETS / "v30" / DATA_30, v30 / DATA_30)
    for file in (v30 / "meta/tasks.parquet", path):
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(ValueError, match=rf"{file.name}: not a whole parquet file"):
            open_set(v30)


def facts(frames: int, fps: float = 10) -> VideoFacts:
    return VideoFacts(frames, fps, 64, 64, "av1", "yuv420p", 2)


def test_frames_are_counted_where_the_container_agrees(caplog):
    lengths, true = np.array([7, 4, 9]), [0, 7, 11]
    times = np.array(true) / 10

    def first(times: np.ndarray, frames: int) -> list[int]:
        return first_frames(lengths, times, facts(frames), 10, where="x.mp4").tolist()

    assert first(times, 20) == true
    assert first(times + np.array([0, 0.03, 0.04]), 20) == true  # less than half a frame
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert (
            first(times + np.array([0, 0.06, 0.16]), 20) == true
        )  # durations that were added up drift
    assert "1.6 frames off" in caplog.text
    assert first(times + 0.5, 40) == [5, 12, 16]  # others' frames come before: times must do
    assert first(np.array([1.3, 0.9, 0]), 20) == [13, 9, 0]  # in another order
    for wrong, frames in (
        (times + np.array([0, 0.3, 0]), 20),  # it would be cut off by the next one
        (times + 0.5, 20),  # behind the end
        (times + np.array([0.06, 0.06, 0.06]), 40),  # between two frames
        (times * np.nan, 20),
    ):
        with pytest.raises(ValueError, match=rf"x\.mp4: the video has {frames} frames"):
            first(wrong, frames)


def test_a_video_of_version_2_may_be_longer_but_not_shorter(v21, caplog):
    folder = v21 / f"videos/chunk-000/{FRONT}"
    (folder / "episode_000001.mp4").write_bytes((folder / "episode_000000.mp4").read_bytes())
    with caplog.at_level(logging.WARNING):
        assert len(open_set(v21)) == sum(LENGTHS)
    assert "1 videos of observation.images.front" in caplog.text
    (folder / "episode_000000.mp4").write_bytes((folder / "episode_000002.mp4").read_bytes()[:900])
    (folder / "episode_000002.mp4").write_bytes((folder / "episode_000001.mp4").read_bytes())
    with pytest.raises(ValueError, match=r"2 of 3 .*000000\.mp4: not a whole .*expected 9 frames"):
        open_set(v21)


def test_long_gops_are_warned_of_once(v30, caplog):
    from pizero.data.lerobot.encode import VideoEncoder

    path = v30 / f"videos/{FRONT}/chunk-000/file-000.mp4"
    encoder = VideoEncoder(path, fps=10, height=64, width=64, codec="h264", gop=50)
    for _ in range(20):
        encoder.add(np.zeros((64, 64, 3), np.uint8))
    encoder.close()
    with caplog.at_level(logging.WARNING):
        open_set(v30)
        open_set(v30)
    assert caplog.text.count("reencode_videos.py") == 1
    assert "up to 20 frames" in caplog.text


def test_checksums(v30):
    subprocess.run(
        "find meta data videos -type f -print0 | xargs -0 sha256sum > SHA256SUMS",
        cwd=v30,
        shell=True,
        check=True,
    )
    assert len(open_set(v30)) == sum(LENGTHS)
    path = v30 / f"videos/{FRONT}/chunk-000/file-000.mp4"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"file-000\.mp4: expected SHA-256 .* as in SHA256SUMS"):
        open_set(v30)
    (v30 / "meta/more.json").write_text("{}")
    with pytest.raises(ValueError, match=r"SHA256SUMS has no line for meta/more\.json"):
        open_set(v30)
    (v30 / "SHA256SUMS").write_text("what\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS, line 1: expected a checksum and a file"):
        open_set(v30)


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_any_damage_is_told_or_harmless(version, tmp_path):
    """With checksums, a byte that changes anywhere is an error, or changes nothing that is read."""
    original = shutil.copytree(SETS / version, tmp_path / "original")
    files = sorted(p.relative_to(original) for p in original.rglob("*") if p.is_file())
    sums = subprocess.run(["sha256sum", *files], cwd=original, capture_output=True, check=True)
    (original / "SHA256SUMS").write_bytes(sums.stdout)
    cameras = {"front": FRONT, "wrist": "observation.images.wrist"}

    def read(path: Path) -> list[dict[str, Any]]:
        data = open_set(path, cameras=cameras)
        return [data.read(i) for i in range(0, len(data), 5)]

    expected = read(shutil.copytree(original, tmp_path / "whole"))
    rng = random.Random(0)
    path = tmp_path / "damaged"
    refused = 0
    for _ in range(25):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(original, path, ignore=shutil.ignore_patterns(".pizero_index"))
        file = path / rng.choice([*files, Path("SHA256SUMS")])
        data = bytearray(file.read_bytes())
        place = rng.randrange(len(data))
        if rng.random() < 0.2:
            del data[place:]
        else:
            data[place] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        try:
            found = read(path)
        except ValueError:
            refused += 1
            continue
        for a, b in zip(found, expected, strict=True):
            assert a["text"] == b["text"]
            np.testing.assert_array_equal(a["state"], b["state"])
            np.testing.assert_array_equal(a["actions"], b["actions"])
            for camera in cameras:
                np.testing.assert_array_equal(a["images"][camera], b["images"][camera])
    assert refused > 20
