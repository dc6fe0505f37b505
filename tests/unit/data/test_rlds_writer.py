"""Written datasets: tfds opens and decodes them; a killed collection goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rlds_demo import FEATURES, LENGTHS, episode_steps, write_demo

from pizero.data import FeatureSpec, RldsWriter, open_index
from pizero.data.rlds.tfrecord import scan_records, verify_record

METADATA = {"task": "t", "start": 0, "success": True}


def _writer(tmp_path, **changes) -> RldsWriter:
    arguments = {"name": "demo", "features": FEATURES, "splits": ("train",)}
    return RldsWriter(tmp_path, **(arguments | changes))


def _bytes(path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


def test_tfds_opens_and_decodes_what_we_write(demo_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.example_parser import ExampleParserNp

    builder = tfds.builder_from_directory(str(demo_path))
    assert builder.info.full_name == "demo/1.0.0"
    assert {k: s.shard_lengths for k, s in builder.info.splits.items()} == {
        "train": [4, 4],
        "val": [4, 4],
    }
    features = builder.info.features
    assert features["steps"]["observation"]["corner"].shape == (16, 16, 3)
    assert features["steps"]["observation"]["gripper"]._encoding.value == "zlib"
    files = [str(f) for f in builder.info.splits["train"].filepaths]
    parser = ExampleParserNp(features.get_serialized_info())
    number = 0
    for file in files:
        data = Path(file).read_bytes()
        for start, size in scan_records(memoryview(data), name=file):
            verify_record(memoryview(data), start, size, name=file)
            raw = parser.parse_example(data[start : start + size])
            if number == 2:  # tfds cannot decode an empty picture, so take another in its place
                assert set(raw["steps"]["observation"]["wrist"]) == {b""}
                raw["steps"]["observation"]["wrist"] = raw["steps"]["observation"]["corner"]
            example = features.decode_example_np(raw)
            steps = list(example["steps"])
            expected = episode_steps(number, LENGTHS[number])
            assert len(steps) == LENGTHS[number]
            assert example["episode_metadata"]["task"].decode() == f"task {number % 3}"
            assert example["episode_metadata"]["start"] == -number
            for i, step in enumerate(steps):
                np.testing.assert_array_equal(step["action"], expected["action"][i])
                picture = expected["observation"]["corner"][i]
                np.testing.assert_array_equal(step["observation"]["corner"], picture)
                assert step["language_instruction"].decode() == expected["language_instruction"]
                assert step["is_first"] == (i == 0)
                assert step["is_last"] == (i == len(steps) - 1)
            number += 1
    assert number == len(LENGTHS)


def test_split_bytes_agree_with_the_payloads(demo_path):
    info = json.loads((demo_path / "dataset_info.json").read_text())
    for split in info["splits"]:
        sizes = [
            size
            for file in demo_path.glob(f"demo-{split['name']}.*")
            for _, size in scan_records(memoryview(file.read_bytes()), name=file.name)
        ]
        assert sum(sizes) == int(split["numBytes"])
        assert len(sizes) == sum(map(int, split["shardLengths"]))


def test_order_of_arrival_does_not_matter(tmp_path):
    results = []
    for order in (range(4), reversed(range(4))):
        writer = _writer(tmp_path / f"{len(results)}", shards=2)
        for i in order:
            writer.add_episode("train", episode_steps(i, 2), METADATA, key=f"{i}")
        results.append(_bytes(writer.finish()))
    assert results[0] == results[1]


@pytest.mark.parametrize("damage", ["nothing", "torn record", "torn log line", "unlogged record"])
def test_a_killed_collection_goes_on(tmp_path, damage):
    whole = write_demo(tmp_path / "whole", lengths=(3, 2, 4), shards=1)
    writer = RldsWriter(tmp_path / "killed", name="demo", features=FEATURES)
    metadata = [{"task": f"task {i % 3}", "start": -i, "success": i != 1} for i in range(3)]
    for i in range(2):
        writer.add_episode("train", episode_steps(i, (3, 2)[i]), metadata[i], key=f"train {i:03d}")
    parts = writer.path / ".parts"
    writer.close()
    record = (parts / "train.tfrecord").read_bytes()
    if damage == "torn record":
        (parts / "train.tfrecord").write_bytes(record + record[:100])
    elif damage == "torn log line":
        with (parts / "episodes.jsonl").open("a") as log:
            log.write('{"key": "train 0')
    elif damage == "unlogged record":
        (parts / "train.tfrecord").write_bytes(record + record)
    with RldsWriter(tmp_path / "killed", name="demo", features=FEATURES) as writer:
        assert writer.keys("train") == ["train 000", "train 001"]
        assert "train 001" in writer
        assert "train 002" not in writer
        for i, length in enumerate((3, 2, 4)):
            for split in ("train", "val"):
                key = f"{split} {i:03d}"
                if key not in writer:
                    writer.add_episode(split, episode_steps(i, length), metadata[i], key=key)
        killed = writer.finish()
    assert _bytes(killed) == _bytes(whole)
    assert not (killed / ".parts").exists()


def test_a_finished_dataset_stays_as_it_is(demo_path):
    before = _bytes(demo_path)
    writer = RldsWriter(demo_path.parents[1], name="demo", features=FEATURES)
    assert writer.is_finished
    assert writer.finish() == demo_path
    assert writer.keys("val") == [f"val {i:03d}" for i in range(len(LENGTHS))]
    assert "train 003" in writer
    with pytest.raises(ValueError, match=r"is finished; write to another version"):
        writer.add_episode("train", episode_steps(0, 1), METADATA)
    assert _bytes(demo_path) == before
    assert not (demo_path / ".parts").exists()


def test_refusals_say_what_was_expected(tmp_path):
    writer = _writer(tmp_path)
    steps = episode_steps(0, 3)
    with pytest.raises(ValueError, match=r"has no 'trian'; did you mean 'train'"):
        writer.add_episode("trian", steps, METADATA)
    with pytest.raises(ValueError, match=r"steps/action: expected shape \[3, 4\], got \[2, 4\]"):
        writer.add_episode("train", steps | {"action": np.zeros((2, 4))}, METADATA)
    with pytest.raises(ValueError, match=r"has no 'actoin'; did you mean 'action'"):
        writer.add_episode("train", steps | {"actoin": 0}, METADATA)
    with pytest.raises(ValueError, match=r"steps/reward: expected FeatureSpec.*got nothing"):
        writer.add_episode("train", {k: v for k, v in steps.items() if k != "reward"}, METADATA)
    with pytest.raises(ValueError, match=r"episode_metadata/start: expected .*got nothing"):
        writer.add_episode("train", steps, {"task": "t", "success": True})
    with pytest.raises(ValueError, match=r"episode_metadata/start: expected int64, got float64"):
        writer.add_episode("train", steps, METADATA | {"start": 0.5})
    with pytest.raises(ValueError, match=r"steps/language_instruction: expected 3 steps.*got 1"):
        writer.add_episode("train", steps | {"language_instruction": ["x"]}, METADATA)
    wrong = {"observation": steps["observation"] | {"corner": np.zeros((3, 8, 8, 3), np.uint8)}}
    with pytest.raises(ValueError, match=r"corner: expected shape \[16, 16, 3\], got \[8, 8, 3\]"):
        writer.add_episode("train", steps | wrong, METADATA)
    assert writer.keys() == []
    writer.add_episode("train", steps, METADATA, key="a")
    with pytest.raises(ValueError, match=r"episode 'a' is already stored"):
        writer.add_episode("train", steps, METADATA, key="a")
    with pytest.raises(ValueError, match=r"being written by another process"):
        _writer(tmp_path)
    writer.close()
    with pytest.raises(ValueError, match=r"holds episodes with other features"):
        _writer(tmp_path, features=FEATURES | {"steps/extra": FeatureSpec.scalar()})
    with (
        _writer(tmp_path, shards=2) as writer,
        pytest.raises(ValueError, match=r"'train' of .* has 1 episodes for 2 shards"),
    ):
        writer.finish()


def test_indexed_values_equal_the_written_ones(demo_path):
    index = open_index(demo_path, "train")
    assert index.lengths.tolist() == list(LENGTHS)
    np.testing.assert_array_equal(index.starts, np.cumsum([0, *LENGTHS])[:-1])
    states = [episode_steps(i, n)["observation"]["state"] for i, n in enumerate(LENGTHS)]
    np.testing.assert_array_equal(index.step_values("observation/state"), np.concatenate(states))
    gripper = np.repeat(np.arange(len(LENGTHS)) / 4, LENGTHS)
    np.testing.assert_array_equal(index.step_values("observation/gripper")[:, 0], gripper)
    assert index.episode_values("episode_metadata/success").dtype == bool
    tasks = index.texts(index.episode_values("episode_metadata/task"))
    assert tasks == [f"task {i % 3}" for i in range(len(LENGTHS))]
