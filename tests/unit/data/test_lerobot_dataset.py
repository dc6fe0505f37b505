"""LeRobot sets, written by LeRobot itself: every value and picture, whichever version.

tests/parity/lerobot_sets.py wrote tests/data/lerobot; its `episodes` say what must come out.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parity.lerobot_sets import LENGTHS, TASKS, episodes

from pizero.data import Mix, RldsDataset, compute_statistics
from pizero.data.lerobot import LeRobotDataset
from pizero.data.lerobot.files import find_set
from pizero.data.select import Filters
from pizero.data.standardize import Rule, Standard

SETS = Path(__file__).parents[2] / "data" / "lerobot"
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
CAMERAS = {"base": FRONT, "hand": WRIST}
FRAMES = [frame for _, frames in episodes() for frame in frames]


def copy_set(version: str, folder: Path) -> Path:
    """A set that a test may change; version 2.0 is 2.1 with statistics of the whole only."""
    shutil.copytree(SETS / version.replace("20", "21"), folder)
    if version == "v20":
        (folder / "meta/episodes_stats.jsonl").unlink()
        info = json.loads((folder / "meta/info.json").read_text())
        (folder / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.0"}))
        statistics = {}
        for key in ("observation.state", "action"):
            values = np.stack([frame[key] for frame in FRAMES])
            found = {"min": values.min(0), "max": values.max(0)}
            found |= {"mean": values.mean(0), "std": values.std(0)}
            statistics[key] = {name: x.tolist() for name, x in found.items()}
        (folder / "meta/stats.json").write_text(json.dumps(statistics))
    return folder


def open_set(path: Path, **changes) -> LeRobotDataset:
    arguments = {"path": path, "cameras": CAMERAS, "horizon": 4}
    return LeRobotDataset(**(arguments | changes))


@pytest.fixture(scope="module", params=["v20", "v21", "v30"])
def path(request, tmp_path_factory) -> Path:
    return copy_set(request.param, tmp_path_factory.mktemp("lerobot") / request.param)


@pytest.fixture
def v30(tmp_path) -> Path:
    return copy_set("v30", tmp_path / "set")


@pytest.fixture
def v21(tmp_path) -> Path:
    return copy_set("v21", tmp_path / "set")


def test_every_frame_is_what_was_recorded(path):
    data = open_set(path)
    assert (len(data), data.num_episodes) == (sum(LENGTHS), len(LENGTHS))
    assert (data.state_dim, data.action_dim, data.fps) == (4, 3, 10)
    assert data.texts() == [TASKS[0], TASKS[1], TASKS[0]]
    i = 0
    for episode, (task, frames) in enumerate(episodes()):
        actions = np.stack([frame["action"] for frame in frames])
        for step, frame in enumerate(frames):
            sample = data.read(i)
            assert (sample["episode"], sample["step"], sample["text"]) == (episode, step, task)
            np.testing.assert_array_equal(sample["state"], frame["observation.state"][None])
            rows = [min(step + ahead, len(frames) - 1) for ahead in range(4)]
            np.testing.assert_array_equal(sample["actions"], actions[rows])
            assert sample["action_is_pad"].tolist() == [step + h >= len(frames) for h in range(4)]
            np.testing.assert_array_equal(sample["images"]["hand"], frame[WRIST])
            difference = np.abs(sample["images"]["base"].astype(int) - frame[FRONT])
            assert difference.mean() < 4  # AV1 loses a little
            i += 1


def test_videos_at_random_are_what_one_pass_gives(path):
    import av

    data = open_set(path, cameras={"base": FRONT})
    passes = []
    for file in sorted(path.glob("videos/**/*.mp4")):
        with av.open(str(file)) as container:
            passes += [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    for i in np.random.default_rng(0).permutation(len(data)).tolist():
        np.testing.assert_array_equal(data.read(i)["images"]["base"], passes[i])


def test_other_columns_are_there(path):
    data = open_set(path, state=["observation.state", "next.reward"], text="phase")
    expected = np.stack([np.append(f["observation.state"], f["next.reward"]) for f in FRAMES])
    np.testing.assert_array_equal(data.states, expected)
    assert [data.read(i)["text"] for i in range(7)] == [f["phase"] for f in FRAMES[:7]]
    done = data.index.step_values("next.done", "tensor")
    np.testing.assert_array_equal(done, [f["next.done"][0] for f in FRAMES])
    assert data.metadata("length").tolist() == list(LENGTHS)
    assert data.metadata("episode_index").tolist() == [0, 1, 2]


def test_selections(path):
    assert len(open_set(path, split="train[:2]")) == LENGTHS[0] + LENGTHS[1]
    assert len(open_set(path, split="train[67%:]")) == LENGTHS[2]
    assert len(open_set(path, episodes=[1])) == LENGTHS[1]
    assert open_set(path, episodes={"task": TASKS[1]}).metadata("task").tolist() == [TASKS[1]]
    assert len(open_set(path, filters=Filters(min_steps=7))) == LENGTHS[0] + LENGTHS[2]
    with pytest.raises(ValueError, match="has no 'vall'"):
        open_set(path, split="vall")


def test_history_and_seconds(path):
    data = open_set(path, frames=2, seconds=0.2)  # two frames of the set
    sample = data.read(3)
    np.testing.assert_array_equal(sample["state"][:, 1], [1, 3])
    assert sample["images"]["base"].shape == (2, 64, 64, 3)
    np.testing.assert_array_equal(sample["images"]["hand"][:, 0, 0, 2], [10, 30])
    actions = np.stack([FRAMES[i]["action"] for i in (3, 5, 6, 6)])
    np.testing.assert_array_equal(sample["actions"], actions)
    assert sample["action_is_pad"].tolist() == [False, False, True, True]


def test_seconds_that_are_no_frames_are_refused(path):
    with pytest.raises(ValueError, match=r"got 0\.25, which is 2\.5 frames; near it are 0\.2 or 0"):
        open_set(path, seconds=0.25)
    assert open_set(path, seconds=0.10002).stride == 1  # three of them are within the tolerance
    with pytest.raises(ValueError, match=r"within 0\.0001 s over 16 steps"):
        open_set(path, seconds=0.10002, horizon=16)
    assert open_set(path, seconds=0.10002, horizon=16, tolerance_s=1e-3).stride == 1


def test_names_that_are_not_there(path):
    with pytest.raises(ValueError, match=r"did you mean 'observation\.images\.front'"):
        open_set(path, cameras={"base": "observation.images.frnt"})
    with pytest.raises(ValueError, match=r"did you mean 'observation\.state'"):
        open_set(path, state="observation.sate")
    with pytest.raises(ValueError, match=r"no 'observation\.state'"):
        open_set(path, cameras={"base": "observation.state"})
    with pytest.raises(ValueError, match="did you mean 'task'"):
        open_set(path, text="tsk")


def test_a_rule_on_episodes(path):
    def halve(episode):
        steps = np.arange(0, len(episode["action"]), 2)
        return Standard(
            episode["action"][steps] / 2, episode["observation.state"][steps], rows=steps
        )

    rule = Rule(("action", "observation.state"), halve)
    data = open_set(path, standardize=rule)
    assert data.lengths.tolist() == [4, 2, 5]
    sample = data.read(2)  # the fifth of the first episode
    np.testing.assert_array_equal(sample["actions"][0], FRAMES[4]["action"] / 2)
    np.testing.assert_array_equal(sample["images"]["hand"], FRAMES[4][WRIST])
    difference = np.abs(sample["images"]["base"].astype(int) - FRAMES[4][FRONT])
    assert difference.mean() < 4


def test_the_second_opening_uses_the_index(path, monkeypatch):
    open_set(path)
    monkeypatch.setattr("pizero.data.lerobot.index._make", lambda *_: pytest.fail("made again"))
    open_set(path)


def test_several_processes_make_the_same_index(v21, tmp_path):
    here = open_set(v21)
    shutil.copytree(v21, tmp_path / "copy", ignore=shutil.ignore_patterns(".pizero_index"))
    there = open_set(tmp_path / "copy", index_workers=1)
    assert here.index.columns == there.index.columns
    for i in range(len(here)):
        a, b = here.read(i), there.read(i)
        assert a["text"] == b["text"]
        np.testing.assert_array_equal(a["state"], b["state"])
        np.testing.assert_array_equal(a["images"]["hand"], b["images"]["hand"])
        np.testing.assert_array_equal(a["images"]["base"], b["images"]["base"])


def _first_picture(data: LeRobotDataset) -> np.ndarray:
    return data.read(0)["images"]["base"]


def test_other_processes_open_decoders_of_their_own(path):
    data = open_set(path)
    expected = _first_picture(data)
    copy = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(_first_picture(copy), expected)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(_first_picture, (data,)), expected)
    np.testing.assert_array_equal(_first_picture(data), expected)


def test_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pizero.data.lerobot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs av: pip install 'pizero\[lerobot\]'"):
        importlib.import_module("pizero.data.lerobot")


def test_in_a_mixture_with_rlds(path, demo_path):
    rlds = RldsDataset(
        path=demo_path,
        split="train",
        horizon=4,
        cameras={"base": "observation/corner"},
        state="observation/state",
        action="action",
        text="language_instruction",
    )
    mix = Mix(datasets={"rlds": rlds, "lerobot": open_set(path)}, weights={"rlds": 1, "lerobot": 1})
    where = mix.locate(mix.order(0), np.arange(64))
    names = {mix.read(d, i)["dataset"] for d, i in zip(*map(np.ndarray.tolist, where), strict=True)}
    assert names == {"rlds", "lerobot"}
    state = compute_statistics(open_set(path))["state"]
    values = np.stack([frame["observation.state"] for frame in FRAMES]).astype(np.float64)
    np.testing.assert_allclose(state.mean, values.mean(0), rtol=1e-6)


def test_pictures_in_files_beside_the_table(v21):
    """Older sets name files instead of holding the bytes."""
    file = v21 / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(file)
    rows = table.column(WRIST).to_pylist()
    for i, row in enumerate(rows):
        name = v21 / f"images/{i}.png"
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(row["bytes"])
        rows[i] = {"bytes": None, "path": f"images/{i}.png"}
    place = table.column_names.index(WRIST)
    kind = table.schema.field(WRIST).type
    pq.write_table(table.set_column(place, WRIST, pa.array(rows, kind)), file)
    data = open_set(v21, episodes=[1])
    np.testing.assert_array_equal(data.read(2)["images"]["hand"], FRAMES[7 + 2][WRIST])
    (v21 / "images/2.png").unlink()
    (v21 / "meta/info.json").touch()
    with pytest.raises(ValueError, match=r"episode_000001.parquet, .*wrist, row 2: images/2.png"):
        open_set(v21)


def test_the_disk_that_pictures_take_is_told(v21, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        open_set(v21)
    assert "MB of disk" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    (v21 / "meta/info.json").touch()
    with pytest.raises(ValueError, match="free disk for the pictures"):
        open_set(v21)


def test_annotations_that_hold_from_some_time_on(v30):
    """What LeRobot's annotation pipeline adds: all rows of an episode list all of them."""
    file = v30 / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    rows = [
        [
            {"role": "assistant", "content": text, "style": style, "timestamp": t, "camera": None}
            for style, t, text in (
                ("subtask", 0.0, f"reach {number}"),
                ("subtask", 0.3, f"lift {number}"),
                ("plan", 0.2, "first reach"),
            )
        ]
        for number in table.column("episode_index").to_pylist()
    ]
    info = json.loads((v30 / "meta/info.json").read_text())
    info["features"]["language_persistent"] = {"dtype": "language", "shape": [1], "names": None}
    (v30 / "meta/info.json").write_text(json.dumps(info))
    pq.write_table(table.append_column("language_persistent", pa.array(rows)), file)
    data = open_set(v30, text="language_persistent.subtask")
    texts = [data.read(i)["text"] for i in range(7, 7 + 4)]
    assert texts == ["reach 1", "reach 1", "reach 1", "lift 1"]
    data = open_set(v30, text="language_persistent.plan")
    assert [data.read(i)["text"] for i in range(3)] == ["", "", "first reach"]
    assert open_set(v30).texts() == [TASKS[0], TASKS[1], TASKS[0]]


def test_values_of_episodes_that_are_not_lerobots(v21):
    path = v21 / "meta/episodes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    marks = ({"success": True, "place": "lab"}, {"success": False, "place": "kitchen"}) * 2
    path.write_text("\n".join(json.dumps(r | m) for r, m in zip(rows, marks, strict=False)))
    data = open_set(v21, episodes={"success": True})
    assert data.metadata("place").tolist() == ["lab", "lab"]


def test_a_copy_of_the_hub(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_LEROBOT_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with pytest.raises(ValueError, match="no LeRobot data set 'robots/toy'") as error:
        find_set("robots/toy")
    cache = tmp_path / ".cache/huggingface"
    assert f"{cache}/lerobot/robots/toy" in str(error.value)
    assert f"{cache}/hub/datasets--robots--toy/snapshots" in str(error.value)

    repository = cache / "hub/datasets--robots--toy"
    snapshot = copy_set("v21", repository / "snapshots/0123abcd")
    blob = repository / "blobs/feed"  # files of a snapshot are links
    blob.parent.mkdir()
    (snapshot / "meta/info.json").rename(blob)
    (snapshot / "meta/info.json").symlink_to(blob)
    assert find_set("robots/toy") == snapshot  # the only one
    copy_set("v30", repository / "snapshots/4567cdef")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abcd")
    assert find_set("robots/toy") == snapshot
    (repository / "refs/v3.0").write_text("4567cdef\n")
    assert find_set("robots/toy").name == "4567cdef"
    assert find_set("robots/toy", revision="main") == snapshot
    assert len(open_set(Path("robots/toy"))) == len(FRAMES)
    assert not (repository / "snapshots/4567cdef/.pizero_index").exists()

    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "sets"))
    assert find_set("robots/toy").name == "4567cdef"  # nothing there
    copy_set("v30", tmp_path / "sets/robots/toy")
    assert find_set("robots/toy") == tmp_path / "sets/robots/toy"


def test_only_videos_of_chosen_cameras_are_needed(v30):
    shutil.rmtree(v30 / "videos")
    assert len(open_set(v30, cameras={"hand": WRIST})) == len(FRAMES)
    with pytest.raises(
        ValueError, match=r"3 of 3 episodes lack .*front.*file-000.mp4: there is no"
    ):
        open_set(v30)


def test_skipping_leaves_out_what_cannot_be_read(v21, caplog):
    (v21 / "data/chunk-000/episode_000000.parquet").write_bytes(b"nothing")
    (v21 / f"videos/chunk-000/{FRONT}/episode_000002.mp4").unlink()
    with pytest.raises(ValueError, match=r"episode_000000.parquet: not a whole parquet file"):
        open_set(v21)
    data = open_set(v21, on_error="skip")
    assert data.metadata("episode_index").tolist() == [1]
    assert len(data.index.damaged) == 1
    assert "episode_000000.parquet" in caplog.text
    assert "episode_000002.mp4" in caplog.text
    np.testing.assert_array_equal(data.read(0)["images"]["hand"], FRAMES[7][WRIST])
    np.testing.assert_array_equal(data.read(0)["state"][0], FRAMES[7]["observation.state"])
