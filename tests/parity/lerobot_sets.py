"""Write tests/data/lerobot with LeRobot itself: python tests/parity/lerobot_sets.py FOLDER

Version 2.1 was written by lerobot 0.3.3 and version 3.0 by lerobot 0.4.4, with the same content:
videos of one camera, pictures of another in parquet, numbers, flags and texts.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (7, 4, 9)
TASKS = ("fold the towel", "stack two cups")
FPS = 10
VISUAL = ["height", "width", "channels"]
FEATURES = {
    "observation.images.front": {"dtype": "video", "shape": (64, 64, 3), "names": VISUAL},
    "observation.images.wrist": {"dtype": "image", "shape": (48, 64, 3), "names": VISUAL},
    "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
    "action": {"dtype": "float32", "shape": (3,), "names": ["dx", "dy", "grip"]},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    "phase": {"dtype": "string", "shape": (1,), "names": None},
}


def episodes() -> list[tuple[str, list[dict[str, Any]]]]:
    """The task and the frames of each episode; a square wanders through the front picture."""
    rng = np.random.default_rng(0)
    found = []
    for episode, length in enumerate(LENGTHS):
        frames = []
        for t in range(length):
            front, wrist = np.zeros((64, 64, 3), np.uint8), np.zeros((48, 64, 3), np.uint8)
            front[..., 0], front[..., 1] = 60 * episode + 20, 20 * t + 20
            front[8 * episode : 8 * episode + 16, 4 * t : 4 * t + 16] = (250, 240, 60)
            wrist[..., 2], wrist[..., 0] = 10 * t, episode
            frames.append(
                {
                    "observation.images.front": front,
                    "observation.images.wrist": wrist,
                    "observation.state": np.array([episode, t, rng.normal(), t % 2], np.float32),
                    "action": rng.normal(size=3).astype(np.float32),
                    "next.reward": np.array([float(t == length - 1)], np.float32),
                    "next.done": np.array([t == length - 1]),
                    "phase": "reach" if t < length // 2 else "lift",
                }
            )
        found.append((TASKS[episode % 2], frames))
    return found


def main(folder: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    written = LeRobotDataset.create(
        "local/toy", fps=FPS, features=FEATURES, root=folder, robot_type="toy"
    )
    takes_task = "task" in inspect.signature(written.add_frame).parameters
    for task, frames in episodes():
        for frame in frames:
            if takes_task:
                written.add_frame(frame, task=task)
            else:
                written.add_frame(frame | {"task": task})
        written.save_episode()
    if hasattr(written, "finalize"):
        written.finalize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
