"""Rewriting a set: pictures change, the rest does not; stopped jobs go on; damage is told."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pizero.data import FeatureSpec, RldsDataset, RldsWriter, decode_image
from pizero.data.images import decode_stored, encode_image, resize_depth, resize_image
from pizero.data.rlds.example import Feature, parse_example
from pizero.data.rlds.rewrite import KNOWN_FIXES, Changes, plan_pictures, rewrite
from pizero.data.rlds.spec import DatasetSpec
from pizero.data.rlds.tfrecord import CorruptRecordError, scan_records, verify_record

SIZE = (48, 40)
FEATURES = {
    "steps/observation/image": FeatureSpec.image(80, 96),
    "steps/observation/wrist_image": FeatureSpec.image(64, 64, encoding="png"),
    "steps/observation/thumbnail": FeatureSpec.image(32, 80),
    "steps/observation/grey": FeatureSpec("image", "uint8", (70, 64, 1), "png"),
    "steps/observation/depth": FeatureSpec("image", "uint16", (70, 64, 1), "png"),
    "steps/observation/depth_float": FeatureSpec("image", "float32", (70, 64, 1), "png"),
    "steps/observation/depth_array": FeatureSpec.tensor([64, 66]),
    "steps/observation/raw": FeatureSpec.tensor([64, 64, 3], "uint8", encoding="zlib"),
    "steps/observation/table": FeatureSpec.tensor([64, 64]),
    "steps/observation/state": FeatureSpec.tensor([4]),
    "steps/action": FeatureSpec.tensor([4]),
    "steps/language_instruction": FeatureSpec.text(),
    "steps/is_first": FeatureSpec.scalar("bool"),
    "steps/is_last": FeatureSpec.scalar("bool"),
    "success": FeatureSpec.scalar("bool"),
    "episode_metadata/goal": FeatureSpec.image(128, 128),
}
PICTURES = {
    *(f"steps/observation/{k}" for k in ("image", "wrist_image", "grey", "depth", "depth_float")),
    *("steps/observation/depth_array", "steps/observation/raw", "episode_metadata/goal"),
}
EPISODES = 5


def _png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def _picture(number: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / 9 + number), 128 + 90 * np.cos(y / 11), (x + y + number) % 256]
    return np.stack(waves, -1).astype(np.uint8)


def _episode(number: int) -> tuple[dict, dict]:
    steps = 2 + number % 2
    depth = (np.arange(70 * 64).reshape(70, 64) * (number + 1) % 60000).astype(np.uint16)
    floats = (depth / 7).astype(np.float32)[..., None]
    colour = encode_image(_picture(number, 80, 96))
    observation = {
        "image": [colour, b"", colour][:steps],
        "wrist_image": np.stack([_picture(number + i, 64, 64) for i in range(steps)]),
        "thumbnail": np.stack([_picture(number, 32, 80)] * steps),
        "grey": [_png(_picture(number, 70, 64)[..., 0])] * steps,
        "depth": [_png(depth)] * steps,
        "depth_float": [_png(floats.view(np.uint8))] * steps,
        "depth_array": np.stack([floats[:64, :, 0].repeat(2, 1)[:, :66]] * steps),
        "raw": np.stack([_picture(number, 64, 64)] * steps),
        "table": np.ones((steps, 64, 64)),
        "state": np.full((steps, 4), number),
    }
    values = {
        "observation": observation,
        "action": np.ones((steps, 4)),
        "language_instruction": "x",
    }
    goal = encode_image(_picture(number, 128, 128))
    return values, {"success": number != 1, "episode_metadata/goal": goal}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewrite")
    with RldsWriter(folder, name="demo", features=FEATURES, shards=2) as writer:
        for split in ("train", "val"):
            for number in range(EPISODES):
                steps, metadata = _episode(number)
                writer.add_episode(split, steps, metadata, key=f"{split} {number}")
        path = writer.finish()
    (path / "steps.label.labels.txt").write_text("a\nb\n")
    (path / "dataset_statistics_0.json").write_text("{}")
    return path


def _examples(folder: Path, split: str = "train") -> list[dict[str, Feature]]:
    found = []
    for path in sorted(folder.glob(f"demo-{split}.*")):
        data = memoryview(path.read_bytes())
        for start, size in scan_records(data, name=path.name):
            verify_record(data, start, size, name=path.name)
            found.append(parse_example(data[start : start + size]))
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "rewrite.json"}


def _raw(feature: Feature) -> bytes:
    return bytes(feature.buffer[feature.start : feature.end])


def test_pictures_change_and_all_else_stays(source, tmp_path):
    outcome = rewrite(source, tmp_path, changes=Changes(size=SIZE, quality=100), num_workers=0)
    assert outcome.folder == tmp_path / "demo" / "1.0.0"
    assert (outcome.episodes, outcome.dropped, outcome.is_complete) == (2 * EPISODES, 0, True)
    before, after = _examples(source), _examples(outcome.folder)
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        assert list(old) == list(new)
        assert {k for k in old if _raw(old[k]) != _raw(new[k])} == PICTURES
        steps, _ = _episode(number)
        shown = steps["observation"]
        image, empty, *_ = new["steps/observation/image"].strings()
        assert empty == b""
        expected = resize_image(decode_image(shown["image"][0]), SIZE, kind="lanczos")
        assert np.abs(decode_image(image).astype(int) - expected).mean() < 3
        wrist = new["steps/observation/wrist_image"].strings()[1]
        assert wrist.startswith(b"\xff\xd8\xff")
        expected = resize_image(shown["wrist_image"][1], SIZE, kind="lanczos")
        assert np.abs(decode_image(wrist).astype(int) - expected).mean() < 3
        goal = new["episode_metadata/goal"].strings()[0]
        assert decode_image(goal).shape == (*SIZE, 3)
        grey = decode_stored(new["steps/observation/grey"].strings()[0])
        expected = resize_image(decode_stored(shown["grey"][0]), SIZE, kind="lanczos")
        assert np.abs(grey.astype(int) - expected).mean() < 3
        depth = decode_stored(new["steps/observation/depth"].strings()[0])
        assert depth.dtype == np.uint16
        np.testing.assert_array_equal(depth, resize_depth(decode_stored(shown["depth"][0]), SIZE))
        floats = decode_stored(new["steps/observation/depth_float"].strings()[0]).view(np.float32)
        stored = decode_stored(shown["depth_float"][0]).view(np.float32)
        np.testing.assert_array_equal(floats, resize_depth(stored, SIZE))
        array = new["steps/observation/depth_array"].floats().reshape(-1, *SIZE)
        expected = resize_depth(shown["depth_array"][0][..., None], SIZE)[..., 0]
        np.testing.assert_array_equal(array[0], expected)
    spec = DatasetSpec.load(outcome.folder / "features.json")
    assert spec.steps["observation/image"] == FeatureSpec.image(*SIZE)
    assert spec.steps["observation/wrist_image"] == FeatureSpec.image(*SIZE)
    assert spec.steps["observation/thumbnail"].shape == (32, 80, 3)
    assert spec.steps["observation/depth"] == FeatureSpec("image", "uint16", (*SIZE, 1), "png")
    assert spec.steps["observation/depth_array"].shape == SIZE
    assert spec.steps["observation/raw"].shape == (*SIZE, 3)
    assert spec.steps["observation/table"].shape == (64, 64)
    names = set(_files(outcome.folder)) | {"dataset_statistics_0.json"}
    assert names == set(_files(source))


def test_the_result_is_read_by_us_and_by_tfds(source, tmp_path):
    folder = rewrite(source, tmp_path, changes=Changes(size=SIZE), num_workers=0).folder
    data = RldsDataset(
        path=tmp_path,
        split="train",
        cameras={"base": "observation/image", "wrist": "observation/wrist_image"},
        state="observation/state",
        action="action",
        horizon=2,
    )
    assert data.num_episodes == EPISODES
    assert data.read(0)["images"]["base"].shape == (*SIZE, 3)
    assert data.read(len(data) - 1)["state"][0, 0] == EPISODES - 1
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.example_parser import ExampleParserNp

    info = tfds.builder_from_directory(str(folder)).info
    assert info.splits["train"].shard_lengths == [2, 3]
    parser = ExampleParserNp(info.features.get_serialized_info())
    file = Path(info.splits["train"].filepaths[0])
    buffer = memoryview(file.read_bytes())
    start, size = next(scan_records(buffer, name=file.name))
    assert info.splits["train"].num_bytes == sum(
        size
        for path in info.splits["train"].filepaths
        for _, size in scan_records(memoryview(Path(path).read_bytes()), name=str(path))
    )
    raw = parser.parse_example(bytes(buffer[start : start + size]))
    stored = raw["steps"]["observation"]
    features = info.features["steps"]["observation"]
    for key in ("image", "wrist_image", "raw", "depth_float", "depth_array", "thumbnail"):
        value = features[key].decode_example_np(stored[key][0])
        assert value.shape == features[key].shape
        assert value.dtype == features[key].np_dtype


def test_stopped_jobs_and_shared_ones_end_alike(source, tmp_path):
    changes = Changes(size=SIZE, success="success")
    whole = rewrite(source, tmp_path / "whole", changes=changes, num_workers=0)
    assert (whole.episodes, whole.dropped) == (2 * EPISODES - 2, 2)
    first = rewrite(source, tmp_path / "parts", changes=changes, num_workers=0, part=(1, 2))
    assert not first.is_complete
    assert not (first.folder / "dataset_info.json").exists()
    (first.folder / ".demo-val.tfrecord-00000-of-00002.writing").write_bytes(b"torn")
    second = rewrite(source, tmp_path / "parts", changes=changes, num_workers=0)
    assert second.is_complete
    assert first.episodes + second.episodes == whole.episodes
    assert _files(second.folder) == _files(whole.folder)
    third = rewrite(source, tmp_path / "parts", changes=changes, num_workers=0)
    assert (third.episodes, third.is_complete) == (0, True)
    assert _files(third.folder) == _files(whole.folder)
    info = json.loads((whole.folder / "dataset_info.json").read_text())
    assert [split["shardLengths"] for split in info["splits"]] == [["1", "3"], ["1", "3"]]
    assert not (whole.folder / "episodes.json").exists()  # lists what is no longer there


def test_processes_share_the_shards(source, tmp_path):
    changes = Changes(size=SIZE, success="success")
    alone = rewrite(source, tmp_path / "alone", changes=changes, num_workers=0)
    shared = rewrite(source, tmp_path / "shared", changes=changes, num_workers=2)
    assert (shared.episodes, shared.dropped) == (alone.episodes, alone.dropped)
    assert _files(shared.folder) == _files(alone.folder)


def test_channels_are_flipped_where_named(source, tmp_path):
    changes = Changes(flip=("wrist_image", "observation/raw"))
    after = _examples(rewrite(source, tmp_path, changes=changes, num_workers=0).folder)
    for number, (old, new) in enumerate(zip(_examples(source), after, strict=True)):
        different = {k.split("/")[-1] for k in old if _raw(old[k]) != _raw(new[k])}
        assert different == {"wrist_image", "raw"}
        picture = decode_image(new["steps/observation/wrist_image"].strings()[0])
        np.testing.assert_array_equal(picture, _picture(number, 64, 64)[..., ::-1])  # PNG stays PNG


def test_pictures_of_the_right_size_stay_as_they_are():
    sized = FeatureSpec.image(224, 224)
    spec = DatasetSpec.from_flat(
        {
            "steps/right": sized,
            "steps/any": FeatureSpec("image", "uint8", (224, 224, 3), ""),
            "steps/png": FeatureSpec.image(224, 224, encoding="png"),
            "steps/unknown": FeatureSpec("image", "uint8", (-1, -1, 3), "jpeg"),
            "steps/embedding": FeatureSpec.tensor([77, 512]),
        }
    )
    plan = plan_pictures(spec, Changes(size=(224, 224)))
    assert {key: p.after for key, p in plan.items()} == {"steps/png": sized, "steps/unknown": sized}


def test_memory_does_not_grow_with_the_shard(tmp_path):
    features = {k: FEATURES[k] for k in ("steps/observation/raw", "steps/action")}
    steps = {"observation": {"raw": np.stack([_picture(0, 64, 64)] * 8)}, "action": np.ones((8, 4))}
    peaks = {}
    for episodes in (2, 2, 24):  # the first run fills caches
        name = f"of{episodes}"
        with RldsWriter(tmp_path, name=name, features=features, splits=("train",)) as writer:
            for number in range(episodes):
                if not writer.is_finished:
                    writer.add_episode("train", steps, key=f"{number:03d}")
            path = writer.finish()
        target = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        tracemalloc.start()
        try:
            rewrite(path, target, changes=Changes(size=SIZE), num_workers=0)
            peaks[episodes] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peaks[24] < 1.2 * peaks[2]


@pytest.fixture
def damaged(source, tmp_path):
    """A copy whose second training shard can be changed; and that shard."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    return copy, copy / "demo-train.tfrecord-00001-of-00002"


def test_damage_is_told_with_file_and_offset(damaged, tmp_path):
    copy, shard = damaged
    whole = shard.read_bytes()
    spans = list(scan_records(memoryview(whole), name="shard"))
    changes = Changes(size=SIZE)
    torn = bytearray(whole)
    torn[spans[1][0] + 500] ^= 1
    shard.write_bytes(torn)
    with pytest.raises(
        CorruptRecordError, match=rf"00001-of-00002: the payload at .* {spans[1][0]}"
    ):
        rewrite(copy, tmp_path / "out", changes=changes, num_workers=0)
    assert not list((tmp_path / "out").glob("**/.*.writing"))
    outcome = rewrite(copy, tmp_path / "out", changes=changes, num_workers=0, on_error="skip")
    assert outcome.is_complete
    assert len(outcome.damaged) == 1
    info = json.loads((outcome.folder / "dataset_info.json").read_text())
    assert info["splits"][0]["shardLengths"] == ["2", "2"]

    shard.write_bytes(whole[: spans[2][0] - 12])  # one record fewer, at a record's end
    with pytest.raises(CorruptRecordError, match=r"expected 3 episodes, as dataset_info.*got 2"):
        rewrite(copy, tmp_path / "short", changes=changes, num_workers=0)
    shard.write_bytes(whole[:-5])
    with pytest.raises(CorruptRecordError, match="truncated record at offset"):
        rewrite(copy, tmp_path / "cut", changes=changes, num_workers=0)
    shard.unlink()
    with pytest.raises(ValueError, match=r"expected 4 shards .*, 1 are missing: demo-train"):
        rewrite(copy, tmp_path / "gone", changes=changes, num_workers=0)


def test_a_broken_picture_is_told_with_its_key(tmp_path):
    features = {k: FEATURES[k] for k in ("steps/observation/image", "steps/action")}
    with RldsWriter(tmp_path, name="bad", features=features, splits=("train",)) as writer:
        image = encode_image(_picture(0, 80, 96))
        steps = {"observation": {"image": [image[:200]]}, "action": np.zeros((1, 4))}
        writer.add_episode("train", steps)
        path = writer.finish()
    with pytest.raises(
        CorruptRecordError, match=r"offset 12: steps/observation/image: expected a J"
    ):
        rewrite(path, tmp_path / "out", changes=Changes(size=SIZE), num_workers=0)


def test_refusals(source, tmp_path):
    def run(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            rewrite(source, tmp_path / "out", changes=Changes(**changes), num_workers=0)

    run("nothing would change; expected a size")
    run("has no 'wirst_image'; did you mean 'observation/wrist_image'", flip=("wirst_image",))
    run("flags of episodes, has no 'succes'; did you mean 'success'", success="succes")
    run("flags of episodes, has no 'episode_metadata/goal'", success="episode_metadata/goal")
    run("quality in 1..100, got 0", size=SIZE, quality=0)
    run(r"size \(height, width\) of at least 1", size=(0, 224))
    with pytest.raises(ValueError, match=r"part \(i, n\) with 0 <= i < n, got \(2, 2\)"):
        rewrite(source, tmp_path, changes=Changes(size=SIZE), part=(2, 2))
    with pytest.raises(ValueError, match="on_error raise or skip, got 'ignore'"):
        rewrite(source, tmp_path, changes=Changes(size=SIZE), on_error="ignore")
    with pytest.raises(ValueError, match="expected a target apart from the source"):
        rewrite(source, source.parents[1], changes=Changes(size=SIZE), num_workers=0)
    begun = tmp_path / "begun"
    rewrite(source, begun, changes=Changes(size=SIZE), num_workers=0, part=(0, 4))
    with pytest.raises(ValueError, match=r"begun with other changes \(size: \[48, 40\] and \[4, 4"):
        rewrite(source, begun, changes=Changes(size=(4, 4)), num_workers=0)
    other = tmp_path / "other" / "demo" / "1.0.0"
    other.mkdir(parents=True)
    (other / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a data set already"):
        rewrite(source, tmp_path / "other", changes=Changes(size=SIZE), num_workers=0)
    unknown = DatasetSpec.from_flat({"steps/x": FeatureSpec("image", "uint16", (64, 64, 3), "png")})
    with pytest.raises(ValueError, match=r"steps/x: expected pictures of uint8 .* got uint16 \[64"):
        plan_pictures(unknown, Changes(size=SIZE))


def test_two_jobs_do_not_write_one_shard(source, tmp_path):
    import fcntl

    folder = tmp_path / "demo" / "1.0.0"
    folder.mkdir(parents=True)
    with (folder / ".demo-train.tfrecord-00000-of-00002.writing").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being written by another process"):
            rewrite(source, tmp_path, changes=Changes(size=SIZE), num_workers=0)


def _command():
    path = Path(__file__).parents[3] / "scripts" / "resize_rlds.py"
    spec = importlib.util.spec_from_file_location("resize_rlds", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_command(source, tmp_path, capsys, monkeypatch):
    main = _command()
    words = [str(source), str(tmp_path), "--size", "48x40", "--filter-success"]
    main([*words, "--flip-wrist-channels", "--workers", "0", "--part", "0/2"])
    said = capsys.readouterr().out
    assert (
        "3 episodes written, 1 failed ones dropped; shards of other parts are missing" not in said
    )
    assert "; shards of other parts are missing" in said
    plan = json.loads((tmp_path / "demo" / "1.0.0" / "rewrite.json").read_text())["changes"]
    assert plan["flip"] == ["observation/wrist_image"]
    assert plan["success"] == "success"
    with pytest.raises(SystemExit, match=r"error: .* was begun with other changes"):
        main([*words, "--workers", "0"])
    monkeypatch.setitem(KNOWN_FIXES, "demo", {"flip": ("image",)})
    fresh = [str(source), str(tmp_path / "fresh"), "--size", "48", "--workers", "0"]
    main([*fresh, "--part", "0/9"])
    assert "note: demo is known to need flip ('image',); --known-fixes does it" in (
        capsys.readouterr().out
    )
    os.remove(tmp_path / "fresh" / "demo" / "1.0.0" / "rewrite.json")
    main([*fresh, "--part", "0/9", "--known-fixes"])
    plan = json.loads((tmp_path / "fresh" / "demo" / "1.0.0" / "rewrite.json").read_text())
    assert plan["changes"]["flip"] == ["image"]
