"""Frames of a dataset: what a sample holds, selections, history, and genuine Bridge episodes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from rlds_demo import FEATURES, LENGTHS, episode_steps, open_demo

from pizero.data import CorruptRecordError, FeatureSpec, RldsDataset, RldsWriter, decode_image


def test_every_frame_is_the_one_it_should_be(demo):
    assert len(demo) == sum(LENGTHS)
    assert demo.num_episodes == len(LENGTHS)
    i = 0
    for episode, length in enumerate(LENGTHS):
        actions = episode_steps(episode, length)["action"]
        for step in range(length):
            sample = demo[i]
            assert (sample["episode"], sample["step"]) == (episode, step)
            np.testing.assert_array_equal(sample["state"], [[episode, step, 0, 0]])
            rows = [min(step + ahead, length - 1) for ahead in range(4)]
            np.testing.assert_array_equal(sample["actions"], actions[rows])
            assert sample["action_is_pad"].tolist() == [step + h >= length for h in range(4)]
            assert sample["text"] == ("" if episode == 3 else f"do task {episode % 3}")
            pixel = sample["images"]["corner"][5, 5].tolist()
            assert pixel == [episode * 10, step * 10, 0]
            assert set(sample["images"]) == ({"corner"} if episode == 2 else {"corner", "wrist"})
            i += 1
    assert i == len(demo)


def test_dtypes(demo):
    sample = demo.read(0)
    assert sample["state"].dtype == sample["actions"].dtype == np.float32
    assert sample["images"]["wrist"].dtype == np.uint8
    assert demo.read(-1)["episode"] == len(LENGTHS) - 1
    with pytest.raises(IndexError, match=f"frame 37 of a dataset with {len(demo)}"):
        demo.read(37)


def test_history_repeats_the_first_frame(demo_path):
    demo = open_demo(demo_path, frames=3)
    sample = demo.read(1)
    assert sample["state"][:, 1].tolist() == [0, 0, 1]
    assert sample["images"]["corner"][:, 0, 0, 1].tolist() == [0, 0, 10]
    start = int(demo.episode_starts[3])
    assert demo.read(start)["state"][:, :2].tolist() == [[3, 0]] * 3
    assert demo.read(start + 4)["state"][:, 1].tolist() == [2, 3, 4]


def test_keys_are_concatenated_in_order(demo_path):
    both = ["action", "observation/gripper"]
    demo = open_demo(demo_path, action=both, state=both[::-1])
    assert (demo.action_dim, demo.state_dim) == (5, 5)
    sample = demo.read(7)
    assert sample["actions"][0].tolist() == [2.5, 1.5, 0.5, 0.5, 0.5]
    assert sample["state"][0].tolist() == [0.5, 2.5, 1.5, 0.5, 0.5]
    assert open_demo(demo_path, state=None).read(0)["state"].shape == (1, 0)


def test_a_dataset_with_the_keys_of_rt1(tmp_path):
    features = {
        "steps/observation/image": FeatureSpec.image(8, 10),
        "steps/observation/natural_language_instruction": FeatureSpec.text(),
        "steps/observation/base_pose_tool_reached": FeatureSpec.tensor((7,)),
        "steps/observation/natural_language_embedding": FeatureSpec.tensor((512,)),
        "steps/observation/workspace_bounds": FeatureSpec.tensor((3, 3)),
        "steps/action/world_vector": FeatureSpec.tensor((3,)),
        "steps/action/rotation_delta": FeatureSpec.tensor((3,)),
        "steps/action/gripper_closedness_action": FeatureSpec.tensor((1,)),
        "steps/action/terminate_episode": FeatureSpec.tensor((3,), "int32"),
        "aspects/success": FeatureSpec.scalar("bool"),
        "attributes/location_name": FeatureSpec.text(),
    }
    writer = RldsWriter(tmp_path, name="rt1", features=features, splits=("train",))
    for episode in range(3):
        steps = {
            key.removeprefix("steps/"): np.full((2, *spec.shape), episode * 10 + i, spec.dtype)
            for i, (key, spec) in enumerate(features.items())
            if spec.kind == "tensor" and key.startswith("steps/")
        }
        steps["observation/image"] = np.zeros((2, 8, 10, 3), np.uint8)
        steps["observation/natural_language_instruction"] = "pick it"
        metadata = {"aspects": {"success": episode != 1}, "attributes/location_name": "desk"}
        writer.add_episode("train", steps, metadata)
    dataset = RldsDataset(
        path=writer.finish(),
        split="train",
        cameras={"primary": "observation/image"},
        state=["observation/base_pose_tool_reached", "observation/workspace_bounds"],
        action=[
            f"action/{key}"
            for key in ("world_vector", "rotation_delta", "gripper_closedness_action")
        ],
        text="observation/natural_language_instruction",
        horizon=2,
        episodes={"aspects/success": True},
    )
    assert dataset.episodes.tolist() == [0, 2]
    sample = dataset.read(2)
    assert sample["actions"].tolist() == [[25, 25, 25, 26, 26, 26, 27]] * 2
    assert sample["state"][0].tolist() == [22] * 7 + [24] * 9
    assert sample["images"]["primary"].shape == (8, 10, 3)
    with pytest.raises(ValueError, match="'observation/natural_language_embedding' is not in the"):
        dataset.index.step_values("observation/natural_language_embedding")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"split": "train[:50%]"}, [0, 1, 2, 3]),
        ({"split": "train[75%:]"}, [6, 7]),
        ({"split": "val[2:4]"}, [2, 3]),
        ({"episodes": [6, 1]}, [1, 6]),
        ({"episodes": {"task": "task 1"}}, [1, 4, 7]),
        ({"episodes": {"task": ["task 1", "task 2"], "success": True}}, [2, 4, 5, 7]),
        ({"split": "train[:50%]", "episodes": {"start": [0, -3, -7]}}, [0, 3]),
        ({"skip_unlabeled": True}, [0, 1, 2, 4, 5, 6, 7]),
    ],
)
def test_selections_have_true_lengths(demo_path, changes, expected):
    demo = open_demo(demo_path, **changes)
    assert demo.episodes.tolist() == expected
    lengths = [LENGTHS[e] for e in expected]
    assert len(demo) == sum(lengths)
    states = [demo.read(i)["state"][0, :2].tolist() for i in range(len(demo))]
    assert states == [[e, t] for e, n in zip(expected, lengths, strict=True) for t in range(n)]
    np.testing.assert_array_equal(demo.states[:, :2], states)
    assert demo.metadata("start").tolist() == [-e for e in expected]
    assert demo.episode_of(np.arange(len(demo))).tolist() == [
        i for i, n in enumerate(lengths) for _ in range(n)
    ]


def test_pickles_small_and_reads_the_same(demo):
    before = demo.read(5)
    data = pickle.dumps(demo)
    assert len(data) < 4000
    after = pickle.loads(data).read(5)
    np.testing.assert_array_equal(after["images"]["corner"], before["images"]["corner"])


def test_errors_name_what_is_there(demo_path):
    for changes, message in [
        ({"cameras": {"a": "observation/cornr"}}, "did you mean 'observation/corner'"),
        ({"state": "observation/stat"}, "did you mean 'observation/state'"),
        ({"action": []}, "expected at least one action key"),
        ({"text": "language"}, "text features, has no 'language'; did you mean 'language_instr"),
        ({"split": "train[1]"}, r"expected a split like .* got 'train\[1\]'"),
        ({"split": "train[8:]"}, r"no episode of 'train\[8:\]' in .* is selected"),
        ({"episodes": [8]}, r"expected episodes in 0\.\.7 of 'train', got 8\.\.8"),
        ({"episodes": {"tsk": "x"}}, "has no 'episode_metadata/tsk'; did you mean"),
        ({"horizon": 0}, "expected horizon >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_demo(demo_path, **changes)


def test_a_broken_picture_names_file_and_offset(tmp_path):
    writer = RldsWriter(tmp_path, name="demo", features=FEATURES, splits=("train",))
    steps = episode_steps(0, 1)
    steps["observation"]["corner"] = [b"\x89PNG broken"]
    writer.add_episode("train", steps, {"task": "", "start": 0, "success": True})
    demo = open_demo(writer.finish())
    with pytest.raises(ValueError, match=r"demo-train.*corner at offset \d+: expected a JPEG or"):
        demo.read(0)
    Path(demo.index.files[0]).write_bytes(b"")
    with pytest.raises(CorruptRecordError, match="the file changed after it was indexed"):
        demo.read(0)


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    path = os.environ.get("PIZERO_BRIDGE_SAMPLE", "")
    if not path or not Path(path).exists():
        pytest.skip("needs PIZERO_BRIDGE_SAMPLE, a folder with a sample of bridge_dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield RldsDataset(
            path=path,
            split="train",
            cameras={f"image_{i}": f"observation/image_{i}" for i in range(4)},
            state="observation/state",
            action="action",
            text="language_instruction",
            horizon=4,
        )


def test_genuine_bridge_agrees_with_tfds(bridge):
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.example_parser import ExampleParserNp

    features = tfds.builder_from_directory(str(bridge.index.directory)).info.features
    parser = ExampleParserNp(features.get_serialized_info())
    with open(bridge.index.files[0], "rb") as file:
        data = file.read()
    position = frame = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 8], "little")
        record = parser.parse_example(data[position + 12 : position + 12 + size])["steps"]
        for t in range(len(record["action"])):
            sample = bridge.read(frame)
            np.testing.assert_array_equal(sample["state"][0], record["observation"]["state"][t])
            np.testing.assert_array_equal(sample["actions"][0], record["action"][t])
            assert sample["text"].encode() == record["language_instruction"][t]
            for name, image in sample["images"].items():
                np.testing.assert_array_equal(image, decode_image(record["observation"][name][t]))
            frame += 1
        position += 12 + size + 4
    assert frame == len(bridge)
