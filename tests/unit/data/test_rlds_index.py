"""The index: rebuilt when data change, shared when not, at home where it may write."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rlds_demo import LENGTHS

from pizero.data import CorruptRecordError, DatasetSpec, FeatureSpec, open_index
from pizero.data.rlds import index as index_module


@pytest.fixture
def copy(demo_path, tmp_path):
    target = tmp_path / "data" / "demo" / "1.0.0"
    shutil.copytree(demo_path, target, ignore=shutil.ignore_patterns(".pizero_index"))
    return target


def test_built_once_and_rebuilt_when_a_file_changes(copy, monkeypatch):
    built = []
    build = index_module._make
    monkeypatch.setattr(index_module, "_make", lambda *a: (built.append(a), build(*a)))
    first = open_index(copy, "train")
    assert open_index(copy.parent, "train").folder == first.folder  # a parent folder will do
    assert len(built) == 1
    shard = next(copy.glob("demo-train*"))
    os.utime(shard, ns=(0, 0))
    second = open_index(copy, "train")
    assert second.folder != first.folder
    assert len(built) == 2


def test_a_worker_process_gives_the_same_index(copy):
    alone = open_index(copy, "train")
    columns = {p.name: np.load(p) for p in alone.folder.glob("*.npy")}
    manifest = alone.manifest
    shutil.rmtree(alone.folder)
    together = open_index(copy, "train", num_workers=1)
    assert together.manifest == manifest
    for name, column in columns.items():
        np.testing.assert_array_equal(np.load(together.folder / name), column)


def test_several_processes_at_once_make_one(copy, monkeypatch):
    built = []
    build = index_module._make
    monkeypatch.setattr(index_module, "_make", lambda *a: (built.append(a), build(*a)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_index(copy, "train").lengths.tolist(), range(4)))
    assert found == [list(LENGTHS)] * 4
    assert len(built) == 1


def test_a_moved_dataset_keeps_its_index(copy, tmp_path):
    folder = open_index(copy, "train").folder
    moved = tmp_path / "elsewhere"
    copy.rename(moved)
    index = open_index(moved, "train")
    assert index.folder == moved / folder.relative_to(copy)
    assert all(Path(f).exists() for f in index.files)


def test_read_only_data_are_indexed_in_the_cache(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy.chmod(0o555)
    try:
        index = open_index(copy, "train")
    finally:
        copy.chmod(0o755)
    assert index.folder.is_relative_to(tmp_path / "cache")
    assert index.lengths.tolist() == list(LENGTHS)
    assert not (copy / ".pizero_index").exists()


def test_pickles_as_a_path(copy):
    index = open_index(copy, "train")
    values = index.step_values("action")
    data = pickle.dumps(index)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).step_values("action"), values)


def test_damage_is_found_while_building(copy):
    shard = sorted(copy.glob("demo-train*"))[1]
    whole = shard.read_bytes()
    index = open_index(copy, "train")
    offset, size = index.step_values("observation/corner")[-1]
    shard.write_bytes(whole[:-10])
    with pytest.raises(CorruptRecordError, match=r"demo-train.*00001-of-00002: truncated record"):
        open_index(copy, "train")
    damaged = bytearray(whole)
    damaged[offset + size // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(CorruptRecordError, match=r"does not match its checksum"):
        open_index(copy, "train")
    assert open_index(copy, "train", verify=False).lengths.tolist() == list(LENGTHS)


def test_missing_things_are_named(copy):
    with pytest.raises(ValueError, match=r"no dataset at .*nowhere: the folder does not exist"):
        open_index(copy / "nowhere", "train")
    with pytest.raises(ValueError, match=r"has no 'trian'; did you mean 'train'\?.*train, val"):
        open_index(copy, "trian")
    index = open_index(copy, "train")
    with pytest.raises(ValueError, match=r"has no 'observation/corners'; did you mean"):
        index.step_values("observation/corners", "image")
    with pytest.raises(ValueError, match=r"image features, has no 'action'.* observation/corner"):
        index.step_values("action", "image")
    with pytest.raises(ValueError, match=r"has no 'episode_metadata/tsak'; did you mean"):
        index.episode_values("episode_metadata/tsak")
    next(copy.glob("demo-train*")).unlink()
    with pytest.raises(ValueError, match=r"expected 2 shards of 'train', got 1"):
        open_index(copy, "train")
    with pytest.raises(ValueError, match=r"expected one folder with features.json"):
        open_index(copy.parents[2] / "data" / "demo" / "1.0.0" / ".pizero_index", "train")


def test_spec_round_trip_and_ragged_features():
    flat = {
        "steps/observation/image": FeatureSpec.image(8, 6),
        "steps/action/world_vector": FeatureSpec.tensor((3,)),
        "steps/done": FeatureSpec.scalar("bool"),
        "aspects/success": FeatureSpec.scalar("bool"),
    }
    spec = DatasetSpec.from_flat(flat)
    tree = json.loads(json.dumps(spec.to_json()))
    assert DatasetSpec.from_json(tree) == spec
    steps = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]
    steps["featuresDict"]["features"]["boxes"] = {
        "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
        "sequence": {"feature": {}, "length": "-1"},
    }
    assert DatasetSpec.from_json(tree).steps["boxes"].kind == "ragged"
    with pytest.raises(ValueError, match=r"expected features under 'steps/'"):
        DatasetSpec.from_flat({"task": FeatureSpec.text()})
    with pytest.raises(ValueError, match=r"stored as 'jpeg' or 'png', got 'gif'"):
        FeatureSpec.image(1, 1, encoding="gif")


def test_a_script_without_a_guard_ends_instead_of_waiting_for_ever(copy, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pizero.data import open_index\n"
        f"print(len(open_index({str(copy)!r}, 'train', num_workers=2).lengths))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ValueError: indexing train of 1.0.0" in done.stderr
    assert "if __name__ == '__main__':" in done.stderr
