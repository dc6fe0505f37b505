"""A simulator of a few lines that can demonstrate, fail, print and die: for the worker's tests."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np


class DemoWorld:
    """`die_once` is a file: the start whose number it holds ends the process and removes it."""

    def __init__(self, *, seconds=0.0, die_once=None, die_at=None, fail_at=None):
        self.seconds, self.die_at, self.fail_at = seconds, die_at, fail_at
        self.die_once = Path(die_once) if die_once else None

    def describe(self):
        tasks = {name: {"sentences": [name], "group": name} for name in ("lift", "drop")}
        return {"tasks": tasks, "cameras": ["front"], "state_dim": 2, "action_dim": 3}

    def reset(self, *, task, start, pool="demo", text=None):
        if start < 0:
            raise ValueError(f"start must be 0 or more, got {start}")
        state = np.full(2, start, np.float32)
        return {"images": {"front": np.zeros((8, 8, 3), np.uint8)}, "state": state, "text": task}

    def run(self, *, actions, film=False):
        return {"double": 2 * actions, "torch": "torch" in sys.modules, "path": sys.executable}

    def demonstrate(self, *, task, start, pool, noise, displace, hold, text=None):
        time.sleep(self.seconds)
        if start == self.die_at:
            sys.stderr.write("the world has ended\n")
            sys.stderr.flush()
            os._exit(3)
        if self.die_once and self.die_once.exists() and start == int(self.die_once.read_text()):
            self.die_once.unlink()
            os._exit(4)
        if start == self.fail_at and task == "drop":
            return {"success": False}
        length = 3 + start % 2 + hold
        images = np.full((length, 8, 8, 3), 20 * start, np.uint8)
        steps = {
            "images": {"front": images},
            "state": np.full((length, 2), noise, np.float32),
            "action": np.full((length, 3), displace, np.float32),
        }
        return {"success": True, "text": f"{task} it", "steps": steps}
