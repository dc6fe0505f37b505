"""Progress of long preparations: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET = 2.0  # seconds before anything is shown
SECONDS = 30.0  # between lines in a log

log = logging.getLogger(__name__)
_T = TypeVar("_T")


def watched(items: Iterable[_T], *, total: int, what: str) -> Iterator[_T]:
    """The items as they come; what takes longer than a moment says how far it is."""
    started = said = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeRemainingColumn(), transient=True)
    task = bar.add_task(what, total=total)
    shown = False
    try:
        for done, item in enumerate(items, start=1):
            now = time.monotonic()
            if sys.stderr.isatty():
                bar.update(task, completed=done)
                if not shown and now - started > QUIET:
                    shown = True
                    bar.start()
            elif now - said > SECONDS:
                said = now
                left = (now - started) / done * (total - done)
                log.info("%s: %d of %d, %.0f s left", what, done, total, left)
            yield item
    finally:
        if shown:
            bar.stop()
