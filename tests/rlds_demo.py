"""A small RLDS dataset in which every frame can be traced, for tests.

state = [episode, step, 0, 0] and action = state + 0.5, so a sample tells where it came from; the
pictures' red channel is the episode and its green channel the step, both times ten.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pizero.data import FeatureSpec, RldsDataset, RldsWriter

FEATURES = {
    "steps/observation/corner": FeatureSpec.image(16, 16, encoding="png"),
    "steps/observation/wrist": FeatureSpec.image(16, 16, encoding="jpeg"),
    "steps/observation/state": FeatureSpec.tensor((4,)),
    "steps/observation/gripper": FeatureSpec.tensor((1,), encoding="zlib"),
    "steps/action": FeatureSpec.tensor((4,)),
    "steps/language_instruction": FeatureSpec.text(),
    "steps/is_first": FeatureSpec.scalar("bool"),
    "steps/is_last": FeatureSpec.scalar("bool"),
    "steps/reward": FeatureSpec.scalar(),
    "episode_metadata/task": FeatureSpec.text(),
    "episode_metadata/start": FeatureSpec.scalar("int64"),
    "episode_metadata/success": FeatureSpec.scalar("bool"),
}
LENGTHS = (5, 1, 2, 7, 4, 6, 3, 9)
KEYS = {
    "cameras": {"corner": "observation/corner", "wrist": "observation/wrist"},
    "state": "observation/state",
    "action": "action",
    "text": "language_instruction",
}


def episode_steps(number: int, length: int) -> dict:
    """Episode 2 has no wrist pictures and episode 3 no instruction."""
    state = np.zeros((length, 4), np.float32)
    state[:, 0], state[:, 1] = number, np.arange(length)
    pixels = np.zeros((length, 16, 16, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = number * 10, (np.arange(length) * 10)[:, None, None]
    return {
        "observation": {
            "corner": pixels,
            "wrist": [b""] * length if number == 2 else pixels,
            "state": state,
            "gripper": np.full((length, 1), number / 4),
        },
        "action": state + 0.5,
        "language_instruction": "" if number == 3 else f"do task {number % 3}",
        "reward": 0.0,
    }


def write_demo(directory: Path, *, lengths: tuple[int, ...] = LENGTHS, shards: int = 2) -> Path:
    """Write the dataset; the split `val` holds the same episodes as `train`, in one shard."""
    with RldsWriter(directory, name="demo", features=FEATURES, shards=shards) as writer:
        for number, length in enumerate(lengths):
            metadata = {"task": f"task {number % 3}", "start": -number, "success": number != 1}
            for split in ("train", "val"):
                key = f"{split} {number:03d}"
                writer.add_episode(split, episode_steps(number, length), metadata, key=key)
        return writer.finish()


def open_demo(path: Path, **changes) -> RldsDataset:
    """The training split with a horizon of 4."""
    return RldsDataset(**({"path": path, "split": "train", "horizon": 4} | KEYS | changes))
