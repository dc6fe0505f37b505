"""The pictures of a data set: a few whole episodes as films and strips, and a look at many frames.

Films need PyAV (the `report` extra); without it there are the strips.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pizero.agent.driving.video import film, scaled
from pizero.data.dataset import EpisodeDataset

FILM_HEIGHT, STRIP_HEIGHT = 176, 104
MAX_FILM_FRAMES, STRIP_FRAMES = 240, 9
MAX_STRIPS, FILMED_STRIPS = 4, 2  # cameras shown as strips, and where a film shows all
QUALITIES = (26, 32, 38)  # of films; the first that fits is taken
PROBED_EPISODES = 24
BLACK = 12  # the brightest value of a picture that shows nothing
NOTHING = (24, 27, 33)

Pictures = Mapping[str, np.ndarray]  # camera -> uint8 [h w 3]


@dataclass(frozen=True)
class CameraProbe:
    """What was found in frames of one camera at three moments of episodes all over the data."""

    sizes: tuple[tuple[int, int], ...]  # (height, width), as they occur
    frames: int  # looked at
    missing: int
    black: int
    episodes: int  # with pictures at all three moments
    frozen: int  # of those: all three pictures are the same


@dataclass(frozen=True)
class Recording:
    """One episode to be shown."""

    number: int
    length: int
    film: bytes | None  # mp4
    strips: Mapping[str, list[bytes | None]]  # camera -> a jpeg for each of the steps
    steps: tuple[int, ...]
    cameras: tuple[str, ...]  # in the film, row by row


@dataclass(frozen=True)
class Probes:
    """Of all cameras, and why some frames could not be read."""

    cameras: Mapping[str, CameraProbe]
    problems: tuple[str, ...]


def probe_cameras(dataset: EpisodeDataset) -> Probes:
    """Look at the first, the middle and the last frame of evenly chosen episodes."""
    names = list(dataset.cameras)
    sizes: dict[str, set[tuple[int, int]]] = {name: set() for name in names}
    count = {name: dict.fromkeys(("missing", "black", "episodes", "frozen"), 0) for name in names}
    chosen = spread(dataset.num_episodes, PROBED_EPISODES)
    frames, problems = 0, []
    for e in chosen:
        first, length = int(dataset.episode_starts[e]), int(dataset.episode_lengths[e])
        if not length:
            continue
        moments = (first, first + (length - 1) // 2, first + length - 1)
        seen = [_pictures(dataset, frame, problems) for frame in moments]
        frames += len(seen)
        for name in names:
            pictures = [view[name] for view in seen if name in view]
            sizes[name] |= {(p.shape[0], p.shape[1]) for p in pictures}
            count[name]["missing"] += len(seen) - len(pictures)
            count[name]["black"] += sum(int(p.max()) <= BLACK for p in pictures)
            if len(pictures) == len(seen) and length >= 3:
                count[name]["episodes"] += 1
                same = all(np.array_equal(pictures[0], p) for p in pictures[1:])
                count[name]["frozen"] += same
    cameras = {
        name: CameraProbe(sizes=tuple(sorted(sizes[name])), frames=frames, **count[name])
        for name in names
    }
    return Probes(cameras, tuple(dict.fromkeys(problems)))


def record(
    dataset: EpisodeDataset, episode: int, *, fps: float | None, max_bytes: int
) -> Recording:
    """Film and strips of an episode; the film of at most `max_bytes`, or none."""
    first, length = int(dataset.episode_starts[episode]), int(dataset.episode_lengths[episode])
    steps = spread(length, MAX_FILM_FRAMES)
    views = [_pictures(dataset, first + s, []) for s in steps]
    names = [name for name in dataset.cameras if any(name in view for view in views)]
    seconds = length / (fps or 10.0)
    made = None
    if names and length > 1:
        made = _film(_tiled(names, views), fps=len(steps) / seconds, max_bytes=max_bytes)
    shown = spread(len(steps), STRIP_FRAMES)
    strips = {
        name: [None if (view := views[i].get(name)) is None else _jpeg(view) for i in shown]
        for name in names[: MAX_STRIPS if made is None else FILMED_STRIPS]
    }
    return Recording(
        number=episode,
        length=length,
        film=made,
        strips=strips,
        steps=tuple(steps[i] for i in shown),
        cameras=tuple(names),
    )


def spread(total: int, count: int) -> list[int]:
    """At most `count` of range(total), from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int)).tolist()


def _pictures(dataset: EpisodeDataset, frame: int, problems: list[str]) -> dict[str, np.ndarray]:
    """The newest picture of each camera; none, and a line in `problems`, where one is damaged."""
    try:
        images = dataset.read(frame)["images"]
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return {}
    return {name: view if view.ndim == 3 else view[-1] for name, view in images.items()}


def _tiled(names: Sequence[str], views: Sequence[Pictures]) -> list[np.ndarray]:
    """All cameras in one picture, as square as it goes; what is missing is dark."""
    shapes = {n: next(v[n].shape for v in views if n in v) for n in names}
    widths = {n: max(1, round(w * FILM_HEIGHT / h)) for n, (h, w, _) in shapes.items()}
    columns = math.ceil(math.sqrt(len(names)))
    rows = [names[i : i + columns] for i in range(0, len(names), columns)]
    width = max(sum(widths[n] for n in row) for row in rows)
    tiled = []
    for view in views:
        canvas = np.full((FILM_HEIGHT * len(rows), width, 3), NOTHING, np.uint8)
        for r, row in enumerate(rows):
            x = 0
            for name in row:
                if name in view:
                    picture = scaled(view[name], height=FILM_HEIGHT)[:, : widths[name]]
                    canvas[r * FILM_HEIGHT :, x : x + picture.shape[1]][:FILM_HEIGHT] = picture
                x += widths[name]
        tiled.append(canvas)
    return tiled


def _film(frames: Sequence[np.ndarray], *, fps: float, max_bytes: int) -> bytes | None:
    for quality in QUALITIES:
        try:
            made = film(frames, fps=fps, crf=quality)
        except ValueError:  # no PyAV
            return None
        if len(made) <= max_bytes:
            return made
    return None


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scaled(picture, height=STRIP_HEIGHT)).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
