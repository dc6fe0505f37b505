"""Starts one training command again and again, kills it with SIGKILL, and lets it end at last.

    python kill_driver.py KILLS SEED RUN_FOLDER OVERRIDES...

Imports are done once and each attempt is a fork, so an attempt costs no start-up. Half of the kills
come at any moment, half while a checkpoint is being written. Prints one JSON line that counts them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from pizero.agent import train  # noqa: F401  (the import that takes long)
from pizero.agent.run import main

LIMIT_S = 120


def attempt(arguments: list[str]) -> int:
    """Fork a process that runs the command; returns its id."""
    child = os.fork()
    if child == 0:
        # As after a fresh start, or the test would not notice a missing seed.
        random.seed(time.time_ns())
        torch.seed()
        sys.argv = ["run.py", *arguments]
        status = 1
        try:
            main()
            status = 0
        except SystemExit as leave:
            print(leave.code, file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def wait_for_write(root: Path, until: float) -> None:
    """Return when a checkpoint is half-written, or at the given time."""
    while time.monotonic() < until and not any(root.glob(".writing_step*")):
        time.sleep(0.0002)


def drive(kills: int, seed: int, folder: Path, arguments: list[str]) -> dict[str, int]:
    """Kill `kills` times, then let the command end; counts what was hit."""
    moments = random.Random(seed)
    counts = {"killed": 0, "while writing a checkpoint": 0, "finished early": 0}
    root = folder / "checkpoints"
    longest = 1.0  # of an attempt; grows to what the machine needs
    for number in range(kills):
        child = attempt(arguments)
        started = time.monotonic()
        if number % 2:
            wait_for_write(root, started + LIMIT_S)
            time.sleep(moments.uniform(0.0, 0.01))
        else:
            time.sleep(moments.uniform(0.0, longest))
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            counts["finished early"] += 1
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts["killed"] += 1
        counts["while writing a checkpoint"] += any(root.glob(".writing_step*"))
        longest = max(longest, min(4.0, time.monotonic() - started))
    _, status = os.waitpid(attempt(arguments), 0)
    if status:
        raise SystemExit(f"the last attempt failed with status {status}")
    return counts


if __name__ == "__main__":
    result = drive(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    print(json.dumps(result))
