"""A set that TensorFlow Datasets wrote, with every encoding: our reader finds what tfds reads.

tests/parity/tfds_sets.py made tests/data/rlds_tf; tests/parity/test_tfds.py sees that it is so.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pizero.data import RldsDataset, decode_image, open_index
from pizero.data.index import Index

SET = Path(__file__).parents[2] / "data" / "rlds_tf" / "every_encoding"
EXPECTED = dict(np.load(SET / "1.0.0" / "expected.npz"))
LEFT_OUT = {  # with a reason; sets for policies have none of these
    "steps/matrix",
    "steps/ragged/deep",
    "steps/ragged/packed",
    "steps/varying",
    "steps/words",
}
COLOUR = ("any", "grey", "jpeg", "png", "rgba")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return shutil.copytree(SET, tmp_path_factory.mktemp("written") / "every_encoding")


@pytest.fixture(scope="module")
def index(path) -> Index:
    return open_index(path, "train")


def _values(index: Index, key: str) -> np.ndarray:
    group, name = ("steps", key[6:]) if key.startswith("steps/") else ("episode", key)
    values = index.step_values(name) if group == "steps" else index.episode_values(name)
    column = index.columns[group][name]
    is_text = column.kind == "text" or column.dtype == "string"
    return np.array(index.texts(values)) if is_text else values


def _keys(kind: str) -> list[str]:
    ragged = {key.removesuffix("/lengths") for key in EXPECTED if key.endswith("/lengths")}
    plain = {key for key in EXPECTED if "/observation/" not in key and "picture" not in key}
    plain -= ragged | {f"{key}/lengths" for key in ragged} | LEFT_OUT
    plain = {key for key in plain if not any(key.startswith(f"{k}/") for k in LEFT_OUT)}
    return sorted(plain if kind == "plain" else ragged - LEFT_OUT)


@pytest.mark.parametrize("key", _keys("plain"))
def test_values_are_those_of_tfds(index, key):
    found, expected = _values(index, key), EXPECTED[key]
    if expected.dtype.kind != "U":
        assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("key", _keys("ragged"))
def test_ragged_values_are_those_of_tfds(index, key):
    found = _values(index, key)
    np.testing.assert_array_equal(found, EXPECTED[key])
    if key.startswith("steps/"):
        ends = index.row_ends(key.removeprefix("steps/"))
        np.testing.assert_array_equal(np.diff(ends, prepend=0), EXPECTED[f"{key}/lengths"])


@pytest.mark.parametrize("name", COLOUR)
def test_pictures_are_those_of_tfds(path, name):
    camera = f"observation/{name}"
    data = RldsDataset(
        path=path, split="train", cameras={"camera": camera}, action="action", horizon=1
    )
    stacked = EXPECTED.get(f"steps/{camera}")
    for i in range(len(data)):
        expected = EXPECTED[f"steps/{camera}/{i}"] if stacked is None else stacked[i]
        expected = np.broadcast_to(expected[..., :3], (*expected.shape[:2], 3))  # grey, no alpha
        np.testing.assert_array_equal(data.read(i)["images"]["camera"], expected)


def test_pictures_outside_the_steps_are_found(path, index):
    spans = index.episode_values("episode_metadata/picture")
    files = [Path(index.files[n]).read_bytes() for n in index.shard]
    for data, (offset, size), expected in zip(
        files, spans.tolist(), EXPECTED["episode_metadata/picture"], strict=True
    ):
        np.testing.assert_array_equal(decode_image(data[offset : offset + size]), expected)


def test_empty_pictures_are_missing(path):
    cameras = {"camera": "observation/png", "empty": "observation/empty"}
    data = RldsDataset(path=path, split="train", cameras=cameras, action="action", horizon=1)
    assert all(data.read(i)["images"].keys() == {"camera"} for i in range(len(data)))


@pytest.mark.parametrize("name", ["depth", "metres"])
def test_what_is_no_colour_picture_is_no_camera(path, name):
    with pytest.raises(ValueError, match=f"uint8 pictures, got observation/{name}"):
        RldsDataset(
            path=path,
            split="train",
            cameras={"camera": f"observation/{name}"},
            action="action",
            horizon=1,
        )


@pytest.mark.parametrize("key", sorted(key.removeprefix("steps/") for key in LEFT_OUT))
def test_what_is_left_out_says_why(index, key):
    with pytest.raises(ValueError, match=f"'{key}' is not in the index: "):
        index.step_values(key)


def test_samples_carry_texts_and_numbers(path):
    data = RldsDataset(
        path=path,
        split="train",
        cameras={},
        state=["raw/float64", "packed/uint64"],
        action="action",
        text="text",
        horizon=2,
    )
    assert data.texts() == ["push", "push", "push"]
    assert data.read(1)["text"] == "größer"
    state = data.read(4)["state"][0]
    expected = [EXPECTED[f"steps/{key}"][4] for key in ("raw/float64", "packed/uint64")]
    np.testing.assert_array_equal(state, np.float32(np.concatenate([e.ravel() for e in expected])))
