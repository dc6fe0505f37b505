"""What a simulator offers: four methods with plain values in and out.

A simulator lives in a worker process (worker.py), maybe under another interpreter, and is spoken to
through client.py. Everything that passes is a dict, list, string, number or numpy array, so any
robot world can stand behind these four methods, whatever its action size or cameras.

An adapter of your own needs no change here: its name is "my_package.my_module:MyClass".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np


class Simulator(Protocol):
    """One robot world that plays one episode at a time.

    An observation is {"images": {camera: uint8 [h w 3]}, "state": float32 [s], "text": str}.
    """

    def describe(self) -> dict[str, Any]:
        """What there is: {"tasks": {task: {"sentences": [...], "group": str}}, "cameras": [...],
        "state_dim": int, "action_dim": int, "control_hz": float, "max_steps": int, "version": str}.

        Tasks of one group share one scene and its starts, so that the words alone tell them apart.
        """
        ...

    def reset(
        self, *, task: str, start: int, pool: str = "demo", text: str | None = None
    ) -> dict[str, Any]:
        """Begin an episode and return its first observation.

        The same (task, start, pool) is the same episode, bit for bit; starts of the pools "demo"
        and "eval" never coincide. `text` None takes one of the task's own sentences.
        """
        ...

    def run(self, *, actions: np.ndarray, film: bool = False) -> dict[str, Any]:
        """Execute float32 actions [n action_dim], one per control step, and look once at the end.

        Returns {"observation": ..., "success": bool [n], "goals": {goal: bool [n]}, "steps": int,
        "done": bool, "film": [uint8 [h w 3], ...]}. `steps` counts since the reset; `done` says
        that the time is up (success ends nothing: that is the evaluator's rule). What would pass
        the time limit is not executed, so `success` can be shorter than `actions`. The film has
        one frame per executed step, and none unless asked for.
        """
        ...

    def demonstrate(
        self,
        *,
        task: str,
        start: int,
        pool: str = "demo",
        noise: float = 0.0,
        displace: bool = False,
        hold: int = 0,
        text: str | None = None,
    ) -> dict[str, Any]:
        """Let the built-in expert play an episode and record it.

        Returns {"success": bool, "text": str, "steps": {"images": {camera: uint8 [t h w 3]},
        "state": float32 [t state_dim], "action": float32 [t action_dim]}}. The actions are the
        expert's own for the state seen; `noise` perturbs only what is executed.
        """
        ...


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not there, with the nearest that is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; there are: {', '.join(names)}")
