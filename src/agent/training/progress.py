"""What a person sees while training runs, and what a program reads afterwards.

`Journal` brings it together: `MetricsFile` is the record (one JSON object a line, each step once,
also after a resume), `Progress` the line on the screen (a moving bar on a terminal, plain lines
elsewhere), run.log what was said, and a tracker hears all of it.
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

from pizero.agent.training.tracking import Example, Tracker


class Journal:
    """Everything a run tells, on rank 0; the same calls do nothing elsewhere."""

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        first_step: int,
        total: int,
        batch_size: int,
        tracker: Tracker | None,
    ) -> None:
        self.is_main, self.tracker = is_main, tracker
        if is_main:
            self._metrics = MetricsFile(folder / "metrics.jsonl", last_step=first_step)
            self._log = (folder / "run.log").open("a")
            self._progress = Progress(total=total, done=first_step, batch_size=batch_size)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, error: object, where: object) -> None:
        if self.is_main:
            if error is not None:
                self._note(f"ended by {error!r}")
            self._progress.close()
            self._metrics.close()
            self._log.close()
            if self.tracker is not None:
                self.tracker.finish()

    def train(self, rows: Sequence[dict[str, Any]]) -> None:
        """Record training steps, oldest first, and show the last."""
        if self.is_main:
            self._progress.update(rows[-1]["step"], loss=rows[-1]["loss"])
            rows[-1]["samples_per_second"] = round(self._progress.speed, 1)
            self._record(rows)

    def val(self, row: Mapping[str, Any], examples: Sequence[Example]) -> None:
        """Record a validation and show it."""
        if self.is_main:
            self._record([row])
            told = ("loss", "action_l1", "undecodable")
            shown = [f"{name} {row[name]:.4f}" for name in told if name in row]
            self.say(f"step {row['step']}, held-out episodes: {', '.join(shown)}")
            if self.tracker is not None:
                self.tracker.show(row["step"], examples)

    def say(self, text: str) -> None:
        """A line that stays, on the screen and in run.log."""
        if self.is_main:
            self._progress.say(text)
            self._note(text)

    def sync(self) -> None:
        """Make sure of the metrics so far; called before a checkpoint that counts on them."""
        if self.is_main:
            self._metrics.sync()

    def _record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._metrics.write(rows)
        if self.tracker is not None:
            self.tracker.log(rows)

    def _note(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        self._log.flush()


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
        """Force the rows so far to the disk."""
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
        self.speed = 0.0  # samples per second
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
        self.speed = rate * self.batch_size
        left = duration((self.total - step) / rate) if rate > 0 else "?"
        text = f"loss {loss:.4f}  {self.speed:.0f} samples/s  {left} left"
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
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # the half-written last line of a killed process
