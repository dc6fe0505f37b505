"""A simulator of a few lines for tests: a point between two walls, and words say which to touch.

Both tasks are one scene, so only the words tell them apart, as with Metaworld's faucet.
"""

from __future__ import annotations

import os
import time

import numpy as np

SENTENCES = {"go-left": ["go to the left wall"], "go-right": ["go to the right wall", "move right"]}


class LineWorld:
    def __init__(self, *, max_steps=12, size=16, die_at_start=None, slow_start=None, also=()):
        self.max_steps, self.size = max_steps, size
        self.die_at_start, self.slow_start, self.also = die_at_start, slow_start, list(also)

    def describe(self):
        sentences = {name: [*own, *self.also] for name, own in SENTENCES.items()}
        tasks = {name: {"sentences": s, "group": "line"} for name, s in sentences.items()}
        return {
            "tasks": tasks,
            "cameras": ["corner", "wrist"],
            "state_dim": 4,
            "action_dim": 4,
            "control_hz": 10.0,
            "max_steps": self.max_steps,
            "version": "1",
        }

    def reset(self, *, task, start, pool="demo", text=None):
        if start == self.die_at_start:
            os._exit(3)
        self.task, self.steps, self.slow = task, 0, start == self.slow_start
        self.text = text or SENTENCES[task][start % len(SENTENCES[task])]
        self.x = np.random.default_rng([start, pool == "eval"]).uniform(-0.2, 0.2)
        return self._observe()

    def run(self, *, actions, film=False):
        goals = {name: [] for name in SENTENCES}
        if self.slow:
            time.sleep(0.15)
        frames = []
        for action in actions[: self.max_steps - self.steps]:
            self.x = float(np.clip(self.x + 0.2 * action[0], -1, 1))
            self.steps += 1
            goals["go-left"].append(self.x <= -1)
            goals["go-right"].append(self.x >= 1)
            if film:
                frames.append(self._draw(4 * self.size))
        return {
            "observation": self._observe(),
            "success": np.array(goals[self.task], dtype=bool),
            "goals": {name: np.array(v, dtype=bool) for name, v in goals.items()},
            "steps": self.steps,
            "done": self.steps >= self.max_steps,
            "film": frames,
        }

    def demonstrate(self, **_):
        raise ValueError("the stand-in has no expert")

    def _observe(self):
        state = np.array([self.x, 0, 0, 0], dtype=np.float32)
        images = {"corner": self._draw(self.size), "wrist": self._draw(self.size)[:, ::-1].copy()}
        return {"images": images, "state": state, "text": self.text}

    def _draw(self, size):
        picture = np.full((size, size, 3), 30, dtype=np.uint8)
        column = round((self.x + 1) / 2 * (size - 1))
        picture[:, max(0, column - 1) : column + 2] = (255, 200, 0)
        return picture
