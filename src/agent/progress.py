"""What a person sees while training runs, and what a program reads afterwards.

`MetricsFile` is the record (one JSON object a line, each step once, also after a resume);
`Progress` is the line on the screen, a moving bar on a terminal and plain lines elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class MetricsFile:
    """metrics.jsonl: appended to, and cut back to the step at which a run resumes."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        self.path = path
        self._keep_up_to(last_step)
        self._file = path.open("a")

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each with `step` and `kind`."""
        self._file.writelines(json.dumps(row) + "\n" for row in rows)
        self._file.flush()

    def sync(self) -> None:
        """Make sure of the rows so far; called before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _keep_up_to(self, last_step: int) -> None:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if _step(line) <= last_step]
        if len(kept) < len(lines):
            short = self.path.with_suffix(".writing")
            short.write_text("".join(kept))
            short.replace(self.path)


class Progress:
    """Step, loss, speed and time left."""

    def __init__(
        self, *, total: int, done: int, batch_size: int, plain: bool | None = None
    ) -> None:
        self.total, self.batch_size = total, batch_size
        # Speed over the last minute or so: the first steps compile and fill caches.
        self._marks = deque([(time.monotonic(), done)], maxlen=20)
        self._bar = None
        if not (plain if plain is not None else not sys.stderr.isatty()):
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=total, completed=done)

    def update(self, step: int, *, loss: float) -> None:
        """Show where the run is."""
        self._marks.append((time.monotonic(), step))
        seconds = self._marks[-1][0] - self._marks[0][0]
        rate = (step - self._marks[0][1]) / max(seconds, 1e-9)
        left = duration((self.total - step) / rate) if rate > 0 else "?"
        text = f"loss {loss:.4f}  {rate * self.batch_size:.0f} samples/s  {left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            print(f"step {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 7 min 05 s, 3 h 20 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # the half-written last line of a killed process
