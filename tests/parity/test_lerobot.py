"""What LeRobot's own reader makes of a set that was written here, and of one of its own.

LeRobot (0.4 or later) is not among the test packages, as it wants older ones of torch and others;
where it can be imported, this compares every number, text and picture.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rlds_demo import open_demo, write_demo

from pizero.data.lerobot import LeRobotDataset, export_episodes
from pizero.data.lerobot.files import INFO, read_json

SETS = Path(__file__).parents[1] / "data" / "lerobot"


@pytest.fixture(scope="module")
def lerobot() -> Any:
    """Their class; a torchvision of another torch breaks its import with a RuntimeError."""
    return pytest.importorskip(
        "lerobot.datasets.lerobot_dataset", exc_type=(ImportError, RuntimeError)
    ).LeRobotDataset


def test_it_opens_what_we_write(lerobot, tmp_path):
    rlds = write_demo(tmp_path / "rlds")
    datasets = {split: open_demo(rlds, split=split) for split in ("train", "val")}
    for images in ("video", "parquet"):
        path = export_episodes(datasets, tmp_path / images, fps=5, images=images)
        compare(lerobot, path)


def test_we_read_what_it_writes(lerobot, tmp_path):
    compare(lerobot, shutil.copytree(SETS / "v30", tmp_path / "set"))


def compare(lerobot: Any, path: Path) -> None:
    info = read_json(path / INFO)
    cameras = {k: k for k, f in info["features"].items() if f["dtype"] in ("image", "video")}
    ahead = {"action": [i / info["fps"] for i in range(5)]}
    theirs = lerobot("local/set", root=path, delta_timestamps=ahead)
    i = 0
    for split in info["splits"]:
        ours = LeRobotDataset(path=path, split=split, cameras=cameras, horizon=5)
        for number in range(len(ours)):
            a, b = ours.read(number), theirs[i]
            np.testing.assert_array_equal(a["state"][0], b["observation.state"])
            np.testing.assert_array_equal(a["actions"], b["action"])
            np.testing.assert_array_equal(a["action_is_pad"], b["action_is_pad"])
            assert a["text"] == b["task"]
            for key in cameras:
                levels = np.rint(b[key].numpy() * 255).transpose(1, 2, 0)
                np.testing.assert_array_equal(a["images"][key], levels)
            i += 1
    assert i == len(theirs)
