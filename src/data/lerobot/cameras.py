"""Where each episode lies in the videos of a camera, from what is said twice about it.

A file of version 2 holds one episode. In version 3 a file holds several, one after the other, and
`from_timestamp` says where each begins: a sum of durations, which drifts from the frames where it
was added up carelessly. So frames are counted, where the container agrees with the count.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pizero.data.lerobot.meta import Meta
from pizero.data.lerobot.video import VideoFacts, probe_video
from pizero.data.workers import Workers

ASTRAY = 0.25  # frames that a time may lie beside a frame, where times are all there is

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Camera:
    """The episodes of one camera."""

    files: list[str]
    table: np.ndarray  # int64 [episodes 2]: position in `files`, first frame; -1 if unreadable
    gop: int  # the longest distance between key frames in any of the files
    problems: list[str]  # of files, one line each


def locate(meta: Meta, key: str, workers: Workers) -> Camera:
    """Look into all videos of a camera; what is wrong with a file is a problem of its episodes."""
    place = meta.videos[key]
    table = np.full((len(meta.numbers), 2), -1, np.int64)
    jobs = [str(meta.directory / name) for name in place.files]
    gop, longer, problems = 0, 0, []
    order = np.argsort(place.file, kind="stable")
    bounds = np.searchsorted(place.file[order], np.arange(len(jobs) + 1))
    what = f"looking into the videos of {key}"
    for number, facts in enumerate(workers(_probe, jobs, what=what)):
        at = order[bounds[number] : bounds[number + 1]]
        try:
            if isinstance(facts, str):
                raise ValueError(facts)
            if abs(facts.fps - meta.fps) > 1e-3 * meta.fps:
                raise ValueError(
                    f"{jobs[number]}: expected {meta.fps:g} frames per second as in "
                    f"meta/info.json, got {facts.fps:g}"
                )
            starts = None if place.start is None else place.start[at]
            first = first_frames(meta.lengths[at], starts, facts, meta.fps, where=jobs[number])
        except ValueError as error:
            problems.append(str(error))
            continue
        table[at] = np.stack([np.full(len(at), number), first], axis=1)
        gop = max(gop, facts.gop)
        longer += starts is None and facts.frames > meta.lengths[at[0]]
    if longer:
        log.warning(
            "%d videos of %s in %s are longer than their episodes; their last frames are not used",
            *(longer, key, meta.directory),
        )
    return Camera(place.files, table, gop, problems)


def first_frames(
    lengths: np.ndarray,
    starts: np.ndarray | None,
    facts: VideoFacts,
    fps: float,
    *,
    where: str,
) -> np.ndarray:
    """The frame at which each of a file's episodes begins, int64 [episodes].

    `starts` [episodes] are seconds; None: the file holds one episode, from its first frame.
    """
    total = int(lengths.sum())
    if starts is None:
        if facts.frames < total:
            raise ValueError(f"{where}: expected {total} frames, its episode's, got {facts.frames}")
        return np.zeros(len(lengths), np.int64)
    said = starts * fps
    counted = np.cumsum(lengths) - lengths
    drift = np.abs(said - counted)
    if facts.frames == total and (drift <= 0.5 + np.arange(len(lengths))).all():
        if drift.max() > 0.5:
            log.warning(
                "%s: from_timestamp is up to %.1f frames off; the frames of earlier episodes were "
                "counted instead",
                *(where, drift.max()),
            )
        return counted
    # Frames of other episodes lie in between, or the order is another one: times must do.
    first = np.rint(said).astype(np.int64) if np.isfinite(said).all() else counted - 1
    order = np.argsort(first, kind="stable")
    ends = (first + lengths)[order]
    fits = first.min() >= 0 and ends[-1] <= facts.frames and (ends[:-1] <= first[order][1:]).all()
    if not fits or (np.abs(said - first) > ASTRAY).any():
        worst = int(np.argmax(drift))
        raise ValueError(
            f"{where}: the video has {facts.frames} frames, its {len(lengths)} episodes {total}; "
            f"from_timestamp puts one of them at frame {said[worst]:g}, but {counted[worst]} "
            "frames are those of episodes before it"
        )
    return first


def _probe(path: str) -> VideoFacts | str:
    """What the container says, or what is wrong with it."""
    try:
        if not Path(path).exists():
            raise ValueError(f"{path}: there is no such file")
        return probe_video(path)
    except ValueError as error:
        return str(error)
