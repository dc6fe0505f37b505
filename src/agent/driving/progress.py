"""What a person watching an evaluation sees: a bar and the running success rate of each task."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pizero.agent.driving.episodes import Episode, EpisodeResult
from pizero.agent.driving.scores import rate

log = logging.getLogger(__name__)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """What pizero logs goes to a file, and to the screen where no bars are in the way."""
    logger = logging.getLogger("pizero")
    before = logger.level
    file, screen = logging.FileHandler(path), logging.StreamHandler()
    file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    screen.setLevel(logging.WARNING if Console().is_terminal else logging.INFO)
    logger.setLevel(logging.INFO)
    for handler in (file, screen):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, screen):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(before)


class EvalProgress:
    """Bars on a terminal, and a log line whenever a task of an arm is complete."""

    def __init__(
        self,
        episodes: Sequence[Episode],
        *,
        finished: Sequence[EpisodeResult],
        rule: str,
        console: Console | None = None,
    ) -> None:
        self.rule = rule
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[score]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.totals: dict[tuple[str, str], int] = {}
        self.outcomes: dict[tuple[str, str], list[bool]] = {}
        for episode in episodes:
            key = (episode.arm, episode.task)
            self.totals[key] = self.totals.get(key, 0) + 1
        self.rows = {
            (arm, task): self.progress.add_task(
                f"[bold]{arm}[/] {task}", total=total, start=False, score=""
            )
            for (arm, task), total in self.totals.items()
        }
        for result in finished:
            self._count(result)

    def __enter__(self) -> EvalProgress:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def add(self, result: EpisodeResult) -> None:
        """Counts a finished episode."""
        key = self._count(result)
        outcomes = self.outcomes[key]
        if len(outcomes) == self.totals[key]:
            score = rate(outcomes)
            log.info(
                "%s, %s: %d of %d (%.0f %%, interval %.0f to %.0f %%)",
                *(result.arm, result.task, score.successes, score.trials),
                *(100 * score.rate, 100 * score.low, 100 * score.high),
            )

    def _count(self, result: EpisodeResult) -> tuple[str, str]:
        key = (result.arm, result.task)
        outcomes = self.outcomes.setdefault(key, [])
        outcomes.append(result.success[self.rule])
        row = self.rows[key]
        if len(outcomes) == 1:
            self.progress.start_task(row)
        self.progress.update(
            row, completed=len(outcomes), score=f"{sum(outcomes) / len(outcomes):.0%}"
        )
        if len(outcomes) == self.totals[key]:
            self.progress.stop_task(row)
        return key
