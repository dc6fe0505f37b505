"""Which episodes are worth watching, and their videos, made by replaying recorded actions.

Filming is a second pass: the scored episodes run at full speed without it, and only when all are
done is it known which succeeded. A simulator that is deterministic plays the recorded actions back
exactly; the caption tells what the replay itself showed, and a difference is reported.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pizero.agent.driving.episodes import EpisodeResult
from pizero.agent.driving.video import scaled, write_video
from pizero.agent.env.client import EnvClient

log = logging.getLogger(__name__)

GAP = 4
GAP_COLOUR = (24, 27, 33)


@dataclass
class FilmConfig:
    """How many episodes of each task an arm shows, and of which tasks (null: all)."""

    successes: int
    failures: int
    tasks: list[str] | None


def choose_films(
    results: Sequence[EpisodeResult], *, film: Mapping[str, FilmConfig], rule: str
) -> list[EpisodeResult]:
    """The first successes and the first failures of each task by start number: no choice by eye."""
    chosen: list[EpisodeResult] = []
    for arm, wanted in film.items():
        of_arm = sorted((r for r in results if r.arm == arm), key=lambda r: r.start)
        for task in dict.fromkeys(r.task for r in of_arm):
            if wanted.tasks is not None and task not in wanted.tasks:
                continue
            of_task = [r for r in of_arm if r.task == task]
            chosen += [r for r in of_task if r.success[rule]][: wanted.successes]
            chosen += [r for r in of_task if not r.success[rule]][: wanted.failures]
    return chosen


def film_episodes(
    results: Sequence[EpisodeResult],
    *,
    folder: Path,
    workers: Sequence[EnvClient],
    pool: str,
    fps: float,
    height: int,
    rule: str,
) -> list[dict[str, Any]]:
    """Films `results` into `folder`/videos, a worker to an episode, and describes each film.

    The actions are read from `folder`/actions. A film that exists is kept.
    """
    idle = list(workers)

    def film(result: EpisodeResult) -> dict[str, Any]:
        path = folder / "videos" / f"{result.key.replace('/', '_')}.mp4"
        if not path.is_file():
            worker = idle.pop()
            try:
                _film(worker, result, folder=folder, path=path, pool=pool, fps=fps, height=height)
            finally:
                idle.append(worker)
        return {
            "path": str(path.relative_to(folder)),
            "arm": result.arm,
            "task": result.task,
            "start": result.start,
            "text": result.text,
            "success": result.success[rule],
            "named_task": result.named_task,
            "named_success": result.named_success[rule] if result.named_success else None,
        }

    with ThreadPoolExecutor(max_workers=len(workers)) as threads:
        return list(threads.map(film, results))


def _film(
    worker: EnvClient,
    result: EpisodeResult,
    *,
    folder: Path,
    path: Path,
    pool: str,
    fps: float,
    height: int,
) -> None:
    actions = np.load(action_file(folder, result.key), allow_pickle=False)
    # A null text would draw the same sentence; the recorded one says so in any case.
    worker.call("reset", task=result.task, start=result.start, pool=pool, text=result.text)
    frames: list[np.ndarray] = []
    reached: list[bool] = []
    named: list[bool] = []
    for action in actions:
        reply = worker.call("run", actions=action[None], film=True)
        frames.append(beside(reply["film"][-1], reply["observation"]["images"], height=height))
        reached.append(bool(reply["success"][0]))
        if result.named_task is not None:
            named.append(bool(reply["goals"][result.named_task][0]))
    if any(reached) != result.success["any"] or reached[-1] != result.success["end"]:
        log.warning("the replay of %s went differently from the scored episode", result.key)
    detail = f"{result.task}, start {result.start}, {result.arm}"
    if result.named_task is not None:
        detail += f" (words of {result.named_task})"
    write_video(
        path,
        frames=frames,
        instruction=result.text,
        detail=detail,
        reached=_from_first(reached),
        missed=not any(reached) and not any(named),
        fps=fps,
    )


def beside(film: np.ndarray, images: Mapping[str, np.ndarray], *, height: int) -> np.ndarray:
    """The film's frame, and right of it, one above the other, what the policy itself sees."""
    side = (height - GAP * (len(images) - 1)) // len(images)
    column = [scaled(picture, height=side) for picture in images.values()]
    width = GAP + max(picture.shape[1] for picture in column)
    large = scaled(film, height=height)
    canvas = np.empty((height, large.shape[1] + width, 3), dtype=np.uint8)
    canvas[:] = GAP_COLOUR
    canvas[:, : large.shape[1]] = large
    for i, picture in enumerate(column):
        top, left = i * (side + GAP), large.shape[1] + GAP
        canvas[top : top + side, left : left + picture.shape[1]] = picture
    return canvas


def action_file(folder: Path, key: str) -> Path:
    """Where the executed actions of an episode lie."""
    return folder / "actions" / f"{key.replace('/', '_')}.npy"


def _from_first(flags: Sequence[bool]) -> list[bool]:
    seen, out = False, []
    for flag in flags:
        seen = seen or flag
        out.append(seen)
    return out
