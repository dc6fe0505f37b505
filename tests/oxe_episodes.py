"""Episodes of every Open X-Embodiment set, made up from the types of its keys.

tests/data/oxe/features.json has, for each set, the keys that cameras and rules may name and what
they are: `float32 7`, `bool`, `text`, `image`, `int32 512`. They are those of the published sets,
or of the programs that wrote them; of sets never published (aloha_static, aloha_dagger, rh20t,
mujoco_manip) they are what Octo reads.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data import FeatureSpec, RldsWriter
from pizero.data.hashing import uniform
from pizero.data.oxe.registry import oxe_set

DATA = Path(__file__).parent / "data" / "oxe"
SAME = {  # sets with the features of another
    "bridge_orig": "bridge_dataset",
    "droid_joint_position": "droid",
    **{f"libero_{s}_no_noops": "libero_spatial_no_noops" for s in ("object", "goal", "10")},
}
GRIPPERS = np.array([0.0, 0.03, 0.4, 0.7, 0.96, 1.0, -1.0, 1.3])
COMMANDS = np.array([0, 0, 0, 0, 0.05, 1, -1, 0.6])
QUATERNIONS = ("furniture_bench_dataset", "iamlab_cmu", "cmu_playing_with_food", "cmu_play_fusion")
SENTENCES = ("push the blue moon", "slide the star to the left", "")


def features(name: str) -> dict[str, str]:
    """The keys below steps/ of a set."""
    name = oxe_set(name).name
    return _features()[SAME.get(name, name)]


def episode(name: str, steps: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Values of all keys but the images, as rules get them; equal for equal arguments.

    They hold what makes a difference: grippers between open and closed, commands that leave the
    gripper as it is, unit quaternions, sentences with NULs after them.
    """
    made: dict[str, np.ndarray] = {}
    for number, (key, kind) in enumerate(features(name).items()):
        if kind == "image":
            continue
        dtype, *shape = kind.removesuffix(" zlib").split()
        size = int(shape[0]) if shape else 1
        draws = uniform(1000 * seed + number, np.arange(steps), size)
        if dtype == "text" or key == "observation/instruction":
            text = SENTENCES[seed % len(SENTENCES)]
            codes = np.zeros(size, np.int32)
            codes[: len(text)] = [ord(c) for c in text][:size]
            value = np.full(steps, text, object) if dtype == "text" else np.tile(codes, (steps, 1))
        elif dtype == "bool":
            value = draws < 0.5
        elif dtype.startswith("int"):
            value = np.floor(2 * draws)
        else:
            value = _numbers(name, key, draws)
        value = value if dtype == "text" else value.astype(dtype)
        made[key] = value if shape or dtype == "text" else value[:, 0]
    return made


def _numbers(name: str, key: str, draws: np.ndarray) -> np.ndarray:
    value = 3 * draws - 1.5
    if key.endswith("gripper_closedness_action"):
        value = COMMANDS[(draws * len(COMMANDS)).astype(int)]
    elif key in ("action", "action/rel_actions_world") and not name.startswith(("gnm", "aloha")):
        value[:, -1] = GRIPPERS[(draws[:, -1] * len(GRIPPERS)).astype(int)]
        if name.startswith(QUATERNIONS):
            value[:, 3:7] /= np.linalg.norm(value[:, 3:7], axis=1, keepdims=True)
    elif key == "observation/position":
        value = np.cumsum(0.1 + draws, axis=0)
    return value


@cache
def _features() -> dict[str, dict[str, str]]:
    found: dict[str, Any] = json.loads((DATA / "features.json").read_text())
    return {oxe_set(name).name: keys for name, keys in found.items()}


def write_set(root: Path, name: str, *, splits: dict[str, int], steps: int = 11) -> Path:
    """A set on disk with those episodes, numbered through the splits; every other one succeeds."""
    known, keys = oxe_set(name), features(name)
    leaves = {f"steps/{key}": _leaf(kind) for key, kind in keys.items()}
    if known.success is not None:
        leaves[known.success] = FeatureSpec.scalar("bool")
    number = 0
    with RldsWriter(
        root, name=known.name, features=leaves, splits=tuple(splits), version="0.1.0"
    ) as writer:
        for split, count in splits.items():
            for _ in range(count):
                pictures = np.full((steps, 8, 8, 3), number, np.uint8)
                values = episode(name, steps, seed=number) | {
                    key: pictures for key, kind in keys.items() if kind == "image"
                }
                success = {} if known.success is None else {known.success: number % 2 == 0}
                writer.add_episode(split, values, success, key=f"{number:03d}")
                number += 1
        return writer.finish()


def _leaf(kind: str) -> FeatureSpec:
    if kind in ("image", "text"):
        return FeatureSpec.image(8, 8) if kind == "image" else FeatureSpec.text()
    dtype, *shape = kind.removesuffix(" zlib").split()
    encoding = "zlib" if kind.endswith(" zlib") else "none"
    return FeatureSpec.tensor([int(n) for n in shape], dtype, encoding=encoding)
