"""The same data through TensorFlow: tfds, an Octo-style pipeline of its own, and our stream.

The reference is written with TensorFlow's operations from the description of the sets; it shares no
code with the package. TensorFlow comes with pizero[rlds-tf].
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tfds_sets import EXPECTED, tfds_arrays, tfds_pictures, write_every_encoding

from pizero.data import (
    Mix,
    Normalizer,
    PolicyPipeline,
    RldsDataset,
    compute_statistics,
    decode_image,
    open_index,
    resize_image,
    save_statistics,
    train_tokenizer,
)
from pizero.data.oxe.transforms import RULES
from pizero.data.rlds.synthetic import write_synthetic
from pizero.data.rlds.tfdata import TfLoader, TfMix, iterate
from pizero.data.select import Filters

pytest.importorskip("tensorflow", reason="needs pizero[rlds-tf]")
pytest.importorskip("tensorflow_datasets", reason="needs pizero[rlds-tf]")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of TensorFlow are not ours

WRITTEN = Path(__file__).parents[1] / "data" / "rlds_tf" / "every_encoding" / "1.0.0"
SETS = {
    "bridge_dataset": {"primary": "observation/image_0", "secondary": "observation/image_1"},
    "fractal20220817_data": {"primary": "observation/image"},
}
TEXTS = {
    "bridge_dataset": "language_instruction",
    "fractal20220817_data": "observation/natural_language_instruction",
}
HORIZON, FRAMES, SIZE = 4, 2, (56, 48)
GRIPPER_STAYS = [True] * 6 + [False]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """Synthetic sets of the published features; bridge has two splits, and missing pictures."""
    folder = tmp_path_factory.mktemp("sets")
    sizes = {"episodes": {"train": 9, "val": 2}, "short_episodes": 2}
    common = {"image_size": (64, 80), "steps": (3, 9), "unlabeled": 0.3, "shards": 2}
    return {
        "bridge_dataset": write_synthetic(folder, "bridge_dataset", **common, **sizes),
        "fractal20220817_data": write_synthetic(
            folder, "fractal20220817_data", **common, episodes={"train": 8}, short_episodes=1
        ),
    }


def _open(paths: dict[str, Path], name: str, **changes: Any) -> RldsDataset:
    arguments = {
        "path": paths[name],
        "split": "train",
        "cameras": SETS[name],
        "text": TEXTS[name],
        "standardize": RULES[name],
        "horizon": HORIZON,
        "frames": FRAMES,
    }
    return RldsDataset(**(arguments | changes))


# The reader ---------------------------------------------------------------------------------------


def _index_equals_tfds(path: Path, split: str) -> int:
    """Compare every column and every picture of a split; how many values were compared."""
    index, compared = open_index(path, split), 0
    expected = tfds_arrays(path, split)
    names = {f"steps/{key}": ("steps", key) for key in index.columns["steps"]}
    names |= {key: ("episode", key) for key in index.columns["episode"]}
    pictures = tfds_pictures(path, split)
    files = [Path(file).read_bytes() for file in index.files]
    owner = np.repeat(index.shard, index.lengths)
    for name, (group, key) in names.items():
        column = index.columns[group][key]
        values = index.step_values(key) if group == "steps" else index.episode_values(key)
        if column.kind == "image":
            shards = owner if group == "steps" else index.shard
            for row, (offset, size) in enumerate(values.tolist()):
                stored = files[shards[row]][offset : offset + size]
                assert stored == pictures[name][row], name
                if size and column.dtype == "uint8":
                    stacked = expected.get(name)
                    pixels = expected[f"{name}/{row}"] if stacked is None else stacked[row]
                    pixels = np.broadcast_to(pixels[..., :3], (*pixels.shape[:2], 3))
                    np.testing.assert_array_equal(decode_image(stored), pixels, err_msg=name)
                compared += 1
            continue
        if column.kind == "text" or column.dtype == "string":
            values = np.array(index.texts(values), np.str_)
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
        if column.kind == "ragged" and group == "steps":
            lengths = np.diff(index.row_ends(key), prepend=0)
            np.testing.assert_array_equal(lengths, expected[f"{name}/lengths"], err_msg=name)
        compared += len(values)
    return compared


@pytest.mark.parametrize("name", SETS)
def test_the_index_holds_what_tfds_reads(paths, name):
    assert _index_equals_tfds(paths[name], "train") > 300


def test_every_encoding_reads_as_in_tfds_when_tfds_wrote_it(tmp_path):
    path = write_every_encoding(tmp_path)
    assert _index_equals_tfds(path, "train") > 300
    stored = dict(np.load(WRITTEN / EXPECTED))
    for key, values in tfds_arrays(path, "train").items():
        np.testing.assert_array_equal(stored[key], values, err_msg=f"in {WRITTEN}, {key}")
    tree = json.loads((path / "features.json").read_text())
    assert json.loads((WRITTEN / "features.json").read_text()) == tree


# Octo's pipeline ----------------------------------------------------------------------------------


def _bridge(steps: dict[str, Any]) -> dict[str, Any]:
    """Movement to the next pose; grippers in between become the next that is not."""
    import tensorflow as tf

    state, gripper = steps["observation"]["state"], steps["action"][:, 6]
    is_open, is_closed = gripper > 0.95, gripper < 0.05

    def settle(later: Any, now: Any) -> Any:
        return tf.where(now[0] | now[1], tf.cast(now[0], tf.float32), later)

    settled = tf.scan(settle, (is_open, is_closed), gripper[-1], reverse=True)
    action = tf.concat([state[1:, :6] - state[:-1, :6], settled[:-1, None]], axis=1)
    images = steps["observation"]
    return {
        "images": {"primary": images["image_0"][:-1], "secondary": images["image_1"][:-1]},
        "state": state[:-1],
        "action": action,
        "text": steps["language_instruction"][:-1],
    }


def _fractal(steps: dict[str, Any]) -> dict[str, Any]:
    """The gripper's commands, 1 to close and -1 to open, as a state that lasts: 1 open."""
    import tensorflow as tf

    command = steps["action"]["gripper_closedness_action"][:, 0]
    opens = tf.where(command < -0.1, 1.0, tf.where(command > 0.1, -1.0, 0.0))
    given = opens[opens != 0]
    first = tf.cond(tf.size(given) > 0, lambda: -given[0], lambda: 1.0)
    lasting = tf.scan(lambda before, now: tf.where(now == 0, before, now), opens, first)
    action = [steps["action"]["world_vector"], steps["action"]["rotation_delta"]]
    observation = steps["observation"]
    return {
        "images": {"primary": observation["image"]},
        "state": tf.concat(
            [observation["base_pose_tool_reached"], observation["gripper_closed"]], axis=1
        ),
        "action": tf.concat([*action, (lasting[:, None] + 1) / 2], axis=1),
        "text": observation["natural_language_instruction"],
    }


RESTRUCTURE = {"bridge_dataset": _bridge, "fractal20220817_data": _fractal}


def _episodes(path: Path, split: str) -> Any:
    """Restructured episodes as tf.data, in the order of the files."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(path))
    episodes = builder.as_dataset(
        split=split,
        decoders={"steps": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    return episodes.map(lambda episode: RESTRUCTURE[path.parent.name](episode["steps"]))


def _octo_statistics(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Over all splits, unlabeled episodes included; p01 and p99 are what Octo calls bounds."""
    episodes = [e for split in _splits(path) for e in _episodes(path, split)]
    found = {}
    for name in ("state", "action"):
        values = np.concatenate([episode[name].numpy() for episode in episodes])
        found[name] = {
            "mean": values.mean(0),
            "std": values.std(0),
            "min": values.min(0),
            "max": values.max(0),
            "q01": np.quantile(values, 0.01, axis=0),
            "q99": np.quantile(values, 0.99, axis=0),
        }
    return found


def _splits(path: Path) -> list[str]:
    return ["train", "val"] if path.parent.name == "bridge_dataset" else ["train"]


def _octo(path: Path, *, late: bool, statistics: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Frames of the labeled training episodes as Octo's pipeline makes them, in order."""
    import tensorflow as tf

    def bounds(values: Any, name: str, mask: list[bool]) -> Any:
        low, high = (tf.constant(statistics[name][k], tf.float32) for k in ("q01", "q99"))
        scaled = tf.clip_by_value(2 * (values - low) / (high - low + 1e-8) - 1, -1, 1)
        return tf.where(mask, scaled, values)

    def chunk(episode: dict[str, Any]) -> dict[str, Any]:
        action, state = episode["action"], episode["state"]
        length = tf.shape(action)[0]
        steps = tf.range(length)[:, None]
        past = tf.maximum(steps + tf.range(1 - FRAMES, 1), 0)
        ahead = steps + tf.range(HORIZON)
        action = bounds(action, "action", GRIPPER_STAYS)
        state = bounds(state, "state", [True] * state.shape[1])
        return {
            "images": {k: tf.gather(v, past) for k, v in episode["images"].items()},
            "state": tf.gather(state, past),
            "actions": tf.gather(action, tf.minimum(ahead, length - 1)),
            "mask": ahead < length + 1 if late else ahead < length,
            "text": episode["text"],
        }

    labeled = _episodes(path, "train").filter(
        lambda e: tf.shape(e["action"])[0] > 0 and tf.strings.length(e["text"][0]) > 0
    )
    for episode in labeled.map(chunk):
        frames = tf.data.Dataset.from_tensor_slices(episode)
        for frame in frames:
            pictures = frame["images"].items()
            yield frame | {"images": {k: _tf_pictures(v) for k, v in pictures if v[0] != b""}}


def _tf_pictures(encoded: Any) -> np.ndarray:
    import tensorflow as tf

    decoded = [tf.io.decode_image(e, expand_animations=False) for e in encoded]
    resized = [tf.image.resize(d, SIZE, method="lanczos3", antialias=True) for d in decoded]
    return np.stack([np.rint(r.numpy()).clip(0, 255).astype(np.uint8) for r in resized])


@pytest.mark.parametrize("octo_compat", [True, False])
@pytest.mark.parametrize("name", SETS)
def test_samples_are_those_of_an_octo_pipeline(paths, name, octo_compat):
    path = paths[name]
    data = _open(paths, name, skip_unlabeled=True, octo_compat=octo_compat)
    everything = {split: _open(paths, name, split=split) for split in _splits(path)}
    statistics = compute_statistics(Mix(datasets=everything))
    octo = {"kind": "quantile", "clip": 1.0, "epsilon": 1e-8, "min_scale": 0.0}
    action = Normalizer(statistics=statistics["action"], mask=GRIPPER_STAYS, **octo)
    state = Normalizer(statistics=statistics["state"], **octo)
    count = errors = 0
    reference = _octo(path, late=octo_compat, statistics=_octo_statistics(path))
    for i, expected in enumerate(reference):
        sample = data.read(i)
        actions = np.clip(action.normalize(sample["actions"]), -1, 1)
        np.testing.assert_allclose(actions, expected["actions"], atol=2e-5)
        states = state.normalize(sample["state"])
        np.testing.assert_allclose(states, expected["state"], atol=2e-5)
        np.testing.assert_array_equal(~sample["action_is_pad"], expected["mask"])
        assert sample["text"] == expected["text"].numpy().decode()
        assert sample["images"].keys() == expected["images"].keys()
        for camera, pictures in expected["images"].items():
            ours = [resize_image(p, SIZE, kind="lanczos") for p in sample["images"][camera]]
            difference = np.abs(np.stack(ours).astype(int) - pictures)
            assert difference.max() <= 1
            errors += difference.mean() / len(expected["images"])
        count += 1
    assert count == len(data) >= 16
    assert errors / count < 1e-3  # grey levels


@pytest.mark.parametrize(("old", "new"), [((256, 256), (224, 224)), ((48, 64), (70, 50))])
def test_lanczos_is_tensorflows(old, new):
    import tensorflow as tf

    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (*old, 3)).astype(np.uint8)
    expected = tf.image.resize(image, new, method="lanczos3", antialias=True).numpy()
    difference = np.abs(resize_image(image, new, kind="lanczos") - np.rint(expected).clip(0, 255))
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


@pytest.mark.parametrize("name", SETS)
def test_statistics_are_octos_over_all_splits(paths, name):
    everything = {s: _open(paths, name, split=s) for s in _splits(paths[name])}
    found = compute_statistics(Mix(datasets=everything))
    for group, expected in _octo_statistics(paths[name]).items():
        for entry, values in expected.items():
            ours = getattr(found[group], entry)
            np.testing.assert_allclose(ours, values, rtol=1e-4, atol=1e-6, err_msg=entry)
    assert found["action"].count == sum(len(data) for data in everything.values())


# The stream ---------------------------------------------------------------------------------------


def _place(sample: dict[str, Any]) -> tuple[int, int]:
    return sample["episode"], sample["step"]


def _same(streamed: dict[str, Any], data: RldsDataset, frames: dict[tuple[int, int], int]) -> None:
    """A streamed sample is what the reader gives for the same frame."""
    expected = data.read(frames[_place(streamed)])
    for key in ("state", "actions", "action_is_pad"):
        np.testing.assert_array_equal(streamed[key], expected[key])
        assert streamed[key].dtype == expected[key].dtype
    assert streamed["text"] == expected["text"]
    assert streamed["images"].keys() == expected["images"].keys()
    for camera, pixels in expected["images"].items():
        np.testing.assert_array_equal(streamed["images"][camera], pixels)
        assert streamed["images"][camera].dtype == pixels.dtype


def _frames(data: RldsDataset) -> dict[tuple[int, int], int]:
    return {_place(data.read(i, images=False)): i for i in range(len(data))}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"frames": 1, "stride": 2, "octo_compat": True},
        {"skip_unlabeled": True, "filters": Filters(max_frames=3, min_steps=3)},
        {"split": "train[1:4]", "standardize": None, "state": "observation/state"},
    ],
    ids=["all", "stride", "filters", "keys"],
)
def test_an_epoch_streams_every_frame_once_as_the_reader_reads_it(paths, changes):
    if "state" in changes:
        changes = changes | {"action": "action"}
    data = _open(paths, "bridge_dataset", **changes)
    frames, n = _frames(data), len(data)
    stream = list(islice(iterate(data, shuffle_buffer=7, read_files=2), 3 * n))
    epochs = [[_place(s) for s in stream[e * n : (e + 1) * n]] for e in range(3)]
    for places in epochs:
        assert sorted(places) == sorted(frames)
    assert epochs[0] != epochs[1] != epochs[2]
    for sample in stream[:n]:
        _same(sample, data, frames)


def test_a_mix_streams_the_sources_in_the_order_of_a_mix(paths):
    parts = {name: _open(paths, name) for name in SETS}
    weights = {"bridge_dataset": 0.7, "fractal20220817_data": 0.3}
    mix = TfMix(datasets=parts, weights=weights, shuffle_buffer=16)
    numbers = np.arange(400)
    wanted, _ = mix.locate(mix.order(3), numbers)
    frames = {name: _frames(data) for name, data in parts.items()}
    counts: dict[str, dict[tuple[int, int], int]] = {name: {} for name in parts}
    samples = list(islice(mix.samples(seed=3), len(numbers)))
    assert [mix.names.index(s["dataset"]) for s in samples] == wanted.tolist()
    assert np.mean(wanted == 0) == pytest.approx(0.7, abs=0.05)
    for sample in samples:
        name = sample["dataset"]
        seen = counts[name]
        seen[_place(sample)] = seen.get(_place(sample), 0) + 1
        # Nothing comes again before all of its source came.
        assert max(seen.values()) - (len(seen) == len(frames[name])) <= min(seen.values())
    for sample in samples[:40]:
        _same(sample, parts[sample["dataset"]], frames[sample["dataset"]])


def test_balanced_groups_are_streamed_each_by_itself(paths):
    data = _open(paths, "bridge_dataset")
    mix = TfMix(datasets={"bridge": data}, balance="has_language", shuffle_buffer=16)
    samples = list(islice(mix.samples(seed=0), 200))
    labeled = [bool(sample["text"]) for sample in samples]
    assert np.mean(labeled) == pytest.approx(0.5, abs=0.1)


def test_ranks_share_the_frames_out(paths):
    data = _open(paths, "bridge_dataset")
    mix = TfMix(datasets={"bridge": data}, shuffle_buffer=8)
    seen = []
    for rank in range(2):
        stream = mix.samples(seed=0, global_batch_size=2, rank=rank, world_size=2)
        places = {_place(s) for s in islice(stream, 2 * len(data))}
        seen.append(places)
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(_frames(data))
    assert abs(len(seen[0]) - len(seen[1])) <= data.episode_lengths.max()
    with pytest.raises(ValueError, match=r"\d episodes .* do not go round 40 ranks"):
        next(mix.samples(seed=0, global_batch_size=40, rank=39, world_size=40))


def test_a_stream_repeats_with_its_seed_and_changes_with_the_start(paths):
    data = _open(paths, "bridge_dataset")
    mix = TfMix(datasets={"bridge": data}, shuffle_buffer=8)

    def places(**arguments: Any) -> list[tuple[int, int]]:
        return [_place(s) for s in islice(mix.samples(**arguments), 12)]

    assert places(seed=1) == places(seed=1)
    assert places(seed=1) != places(seed=2)
    assert places(seed=1, start_sample=4) != places(seed=1)


def test_several_cameras_and_texts_are_drawn_from(paths):
    keys = ["observation/image_0", "observation/image_1"]
    data = _open(paths, "bridge_dataset", cameras={"any": keys}, frames=1)
    singles = [_open(paths, "bridge_dataset", cameras={"any": key}, frames=1) for key in keys]
    frames, chosen = _frames(data), set()
    for sample in islice(iterate(data, shuffle_buffer=4), len(data)):
        options = [single.read(frames[_place(sample)])["images"].get("any") for single in singles]
        found = sample["images"].get("any")
        equal = [i for i, option in enumerate(options) if np.array_equal(option, found)]
        assert equal
        chosen |= set(equal) if len(equal) == 1 else set()
    assert chosen == {0, 1}


@pytest.fixture(scope="module")
def pipeline(paths, tmp_path_factory) -> PolicyPipeline:
    folder = tmp_path_factory.mktemp("assets")
    data = _open(paths, "bridge_dataset")
    save_statistics(compute_statistics(data), folder / "stats.json")
    train_tokenizer(data.texts(), folder / "tokenizer.model", vocab_size=320)
    return PolicyPipeline(
        cameras=["primary", "secondary"],
        image_size=SIZE,
        tokenizer=folder / "tokenizer.model",
        max_tokens=48,
        statistics=folder / "stats.json",
        normalization={"state": "z_score", "action": "z_score"},
        horizon=HORIZON,
        action_dim=7,
        state_dim=7,
        frames=FRAMES,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_as_from_our_own_loader(paths, pipeline, num_workers):
    data = _open(paths, "bridge_dataset")
    loader = TfLoader(
        dataset=TfMix(datasets={"bridge": data}, shuffle_buffer=8),
        pipeline=pipeline,
        seed=0,
        global_batch_size=4,
        accumulate=2,
        num_workers=num_workers,
        start_sample=8,
    )
    batches = list(islice(loader, 4))
    assert loader.samples == 16
    assert [b.sample.tolist() for b in batches] == [[8, 9], [10, 11], [12, 13], [14, 15]]
    encoded = [pipeline.encode(data.read(i)) for i in range(len(data))]
    known = np.stack([e["actions"] for e in encoded])
    for batch in batches:
        frames = [int(np.abs(known - a).sum((1, 2)).argmin()) for a in batch.actions.numpy()]
        expected = pipeline.collate([encoded[i] for i in frames], batch.sample.numpy())
        for name in ("actions", "action_mask"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))
        for name in ("state", "tokens", "token_mask"):
            found = getattr(batch.observation, name)
            assert torch.equal(found, getattr(expected.observation, name))
        difference = batch.observation.images.int() - expected.observation.images.int()
        assert difference.abs().max() <= 1  # TensorFlow resizes


def test_a_damaged_file_is_an_error_that_names_the_set(paths, tmp_path):
    path = shutil.copytree(paths["bridge_dataset"], tmp_path / "bridge_dataset" / "1.0.0")
    data = _open({"bridge_dataset": path}, "bridge_dataset", verify=False)
    file = Path(data.index.files[0])
    stored = bytearray(file.read_bytes())
    stored[len(stored) // 2] ^= 1
    file.write_bytes(stored)
    with pytest.raises(ValueError, match=f"streaming {path}"):
        list(islice(iterate(data, shuffle_buffer=4), len(data)))


def test_windows_are_refused(paths, pipeline):
    data = TfMix(datasets={"bridge": _open(paths, "bridge_dataset")})
    with pytest.raises(ValueError, match="an order of its own; expected order global"):
        TfLoader(dataset=data, pipeline=pipeline, seed=0, global_batch_size=2, order="windowed")
