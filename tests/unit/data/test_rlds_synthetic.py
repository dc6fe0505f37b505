"""Synthetic sets: the features of the published ones, a scene that follows its own rules."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pizero.data import FeatureSpec, RldsDataset, open_index
from pizero.data.rlds import DatasetSpec
from pizero.data.rlds.synthetic import COLOURS, load_features, specs, write_synthetic

BRIDGE = {
    "cameras": {f"image_{i}": f"observation/image_{i}" for i in range(4)},
    "state": "observation/state",
    "action": "action",
    "text": "language_instruction",
}
FRACTAL = {
    "cameras": {"image": "observation/image"},
    "state": ["observation/base_pose_tool_reached", "observation/gripper_closed"],
    "action": [
        "action/world_vector",
        "action/rotation_delta",
        "action/gripper_closedness_action",
    ],
    "text": "observation/natural_language_instruction",
}


@pytest.fixture(scope="module")
def bridge_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge")
    episodes = {"train": 10, "val": 2}
    return write_synthetic(
        folder,
        "bridge_dataset",
        episodes=episodes,
        image_size=(32, 40),
        shards=2,
        unlabeled=0.3,
        short_episodes=2,
    )


@pytest.fixture(scope="module")
def fractal_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fractal")
    return write_synthetic(folder, "fractal20220817_data", episodes={"train": 4})


def _episodes(dataset: RldsDataset):
    states, actions = dataset.states, dataset.actions
    for start, length in zip(dataset.episode_starts, dataset.episode_lengths, strict=True):
        yield states[start : start + length], actions[start : start + length]


def test_a_set_has_exactly_the_features_of_its_specification(bridge_path, fractal_path):
    assert json.loads((fractal_path / "features.json").read_text()) == load_features(
        "fractal20220817_data"
    )
    stored = (bridge_path / "features.json").read_text()
    assert json.loads(stored.replace('"40"', '"256"').replace('"32"', '"256"')) == load_features(
        "bridge_dataset"
    )
    for path in (bridge_path, fractal_path):
        spec = DatasetSpec.load(path / "features.json")
        index = open_index(path, "train")
        wide = {"language_embedding", "observation/natural_language_embedding"}
        assert {k for k in spec.steps if f"steps.{k}" in index.manifest["columns"]} == set(
            spec.steps
        ) - wide


def test_bridge_reads_in_its_own_conventions(bridge_path):
    dataset = RldsDataset(path=bridge_path, split="train", horizon=4, **BRIDGE)
    assert dataset.episode_lengths[:2].tolist() == [1, 2]
    assert dataset.episode_lengths[2:].min() >= 20
    assert len(set(dataset.episode_lengths.tolist())) > 5
    for states, actions in _episodes(dataset):
        expected = states[:-1, :6] + actions[:-1, :6]
        np.testing.assert_allclose(states[1:, :6], expected, atol=1e-6)
        assert set(np.unique(actions[:, 6])) <= {0.0, 1.0}
        assert (actions[0, :6] == 0).all()
    assert {0.0, 0.5, 1.0} == set(np.unique(dataset.states[:, 6]).tolist())
    assert 0 < sum(not text for text in dataset.texts()) < dataset.num_episodes
    assert dataset.metadata("has_language").tolist() == [bool(t) for t in dataset.texts()]


def test_cameras_are_missing_where_the_metadata_says_so(bridge_path):
    dataset = RldsDataset(path=bridge_path, split="train", horizon=1, **BRIDGE)
    for episode, start in enumerate(dataset.episode_starts.tolist()):
        images = dataset.read(start)["images"]
        has = [dataset.metadata(f"has_image_{i}")[episode] for i in range(4)]
        assert [f"image_{i}" in images for i in range(4)] == has
        assert all(image.shape == (32, 40, 3) for image in images.values())
    assert dataset.metadata("has_image_0").all()
    assert not all(dataset.metadata("has_image_1"))


def test_fractal_reads_in_its_own_conventions(fractal_path):
    dataset = RldsDataset(path=fractal_path, split="train", horizon=4, **FRACTAL)
    closed = 0
    for states, actions in _episodes(dataset):
        position, rotation = states[:, :3], Rotation.from_quat(states[:, 3:7]).as_euler("xyz")
        np.testing.assert_allclose(position[1:], position[:-1] + actions[:-1, :3], atol=1e-6)
        np.testing.assert_allclose(rotation[1:], rotation[:-1] + actions[:-1, 3:6], atol=1e-5)
        # The command says when to begin; the gripper follows, and stays.
        begins = np.flatnonzero(actions[:, 6])
        assert len(begins) <= 1
        if len(begins) and begins[0] + 2 < len(states):
            closed += 1
            at = int(begins[0])
            assert actions[at, 6] == 1
            assert states[at : at + 3, 7].tolist() == [0.0, 0.5, 1.0]
            assert (states[at + 2 :, 7] == 1).all()
    assert closed
    image = dataset.read(0)["images"]["image"]
    assert image.shape == (256, 320, 3)
    sizes = dataset.index.step_values("observation/image")[:, 1]
    assert 20_000 < sizes.mean() < 40_000  # bytes of a photograph of this size


def test_the_sentence_tells_where_the_hand_goes(bridge_path):
    """At the end the hand is over a block of the colour that the sentence names."""
    dataset = RldsDataset(path=bridge_path, split="train", horizon=1, **BRIDGE)
    found = 0
    for text, start, length in zip(
        dataset.texts(), dataset.episode_starts, dataset.episode_lengths, strict=True
    ):
        sample = dataset.read(int(start + length - 1))
        if not text or sample["state"][0, 6] > 0:
            continue
        (colour,) = [c for c in COLOURS if c in text]
        x, y, z = (sample["state"][0, :3] - [0.3, 0, 0.03]) / [0.1, 0.15, 0.12]
        column = round((x * 0.85 + 1) / 2 * 40)
        row = round((y * 0.85 - 0.25 * z + 1) / 2 * 32)
        pixel = sample["images"]["image_0"][min(row, 31), min(column, 39)].astype(int)
        nearest = min(COLOURS, key=lambda c: np.abs(pixel - COLOURS[c]).sum())
        found += nearest == colour
    assert found >= 3


def test_equal_arguments_give_equal_files(tmp_path):
    for name in "ab":
        write_synthetic(tmp_path / name, episodes={"train": 2}, image_size=(8, 8), steps=(3, 5))
    write_synthetic(tmp_path / "c", episodes={"train": 2}, image_size=(8, 8), steps=(3, 5), seed=1)
    (a, b, c) = (
        (tmp_path / n / "bridge_dataset/1.0.0/bridge_dataset-train.tfrecord-00000-of-00001")
        for n in "abc"
    )
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()


def test_any_features_json_will_do(tmp_path):
    features = {
        "steps/observation/picture": FeatureSpec.image(12, 10, encoding="png"),
        "steps/observation/joints": FeatureSpec.tensor([6], "float64", encoding="zlib"),
        "steps/observation/mode": FeatureSpec.scalar("int32"),
        "steps/action/joints": FeatureSpec.tensor([2, 3]),
        "steps/language_instruction": FeatureSpec.text(),
        "steps/is_first": FeatureSpec.scalar("bool"),
        "episode_metadata/success": FeatureSpec.scalar("bool"),
    }
    tree = DatasetSpec.from_flat(features).to_json()
    source = tmp_path / "my_robot" / "features.json"
    source.parent.mkdir()
    source.write_text(json.dumps(tree))
    path = write_synthetic(tmp_path / "out", source, episodes={"train": 3}, steps=(4, 6))
    assert path == tmp_path / "out/my_robot/1.0.0"
    dataset = RldsDataset(
        path=path,
        split="train",
        cameras={"picture": "observation/picture"},
        state="observation/joints",
        action="action/joints",
        text="language_instruction",
        horizon=1,
    )
    assert dataset.read(0)["images"]["picture"].shape == (12, 10, 3)
    assert dataset.states.std(0).min() > 0
    assert dataset.actions.std(0).min() > 0
    assert all(dataset.texts())


def test_tfds_opens_the_metadata(bridge_path, fractal_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder_from_directory(str(bridge_path))
    assert builder.info.full_name == "bridge_dataset/1.0.0"
    assert builder.info.features["steps"]["observation"]["image_0"].shape == (32, 40, 3)
    assert {k: s.num_examples for k, s in builder.info.splits.items()} == {"train": 10, "val": 2}
    builder = tfds.builder_from_directory(str(fractal_path))
    assert builder.info.features["aspects"]["success"].np_dtype == np.bool_


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'bridge_dataset'"):
        write_synthetic(tmp_path, "bridge_data", episodes={"train": 1})
    with pytest.raises(ValueError, match=r"no features\.json at"):
        write_synthetic(tmp_path, tmp_path / "features.json", episodes={"train": 1})
    with pytest.raises(ValueError, match="expected steps"):
        write_synthetic(tmp_path, episodes={"train": 1}, steps=(5, 3))
    assert specs() == ["bridge_dataset", "fractal20220817_data"]
