"""Any episodes as a LeRobot data set of version 3.0: of RLDS, or a choice of another set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data.dataset import EpisodeDataset
from pizero.data.lerobot.writer import LeRobotWriter
from pizero.data.progress import watched

OWN = ("episode_index", "length", "task")  # what every LeRobot set says of an episode itself

log = logging.getLogger(__name__)


def export_episodes(
    datasets: Mapping[str, EpisodeDataset], path: str | Path, *, fps: float, **options: Any
) -> Path:
    """Write the chosen episodes of data sets as the splits of one LeRobot set; returns its folder.

    Cameras, state, actions and instruction are what the data sets give, after a standardisation if
    they have one. Episode metadata become further columns of meta/episodes. LeRobot wants every
    camera in every frame: one that an episode lacks is black there, which is counted and logged.
    `options` are those of LeRobotWriter.
    """
    for split, data in datasets.items():
        if len(data) != int(data.lengths.sum()) or data.frames > 1:
            raise ValueError(
                f"{split}: expected whole episodes without history, got {len(data)} of "
                f"{int(data.lengths.sum())} frames, {data.frames} at a time"
            )
    black = _black_pictures(datasets)
    missing: dict[str, int] = {}
    with LeRobotWriter(path, fps=fps, **options) as writer:
        for split, data in datasets.items():
            metadata = _metadata(data)
            episodes = range(data.num_episodes)
            for episode in watched(episodes, total=len(episodes), what=f"writing {split}"):
                first, length = int(data.starts[episode]), int(data.lengths[episode])
                rows = slice(first, first + length)
                frame = int(data.episode_starts[episode])
                texts = [data.read(frame + i, images=False)["text"] for i in range(length)]
                writer.add_episode(
                    _pictures(data, range(frame, frame + length), black, missing),
                    state=data.state_table[rows] if data.state_dim else None,
                    actions=data.action_table[rows],
                    text=texts,
                    metadata={key: values[episode] for key, values in metadata.items()},
                )
        for camera, count in missing.items():
            log.warning("%d frames lack a picture of %s and are black there", count, camera)
        return writer.finish({split: data.num_episodes for split, data in datasets.items()})


def _pictures(
    data: EpisodeDataset,
    frames: range,
    black: Mapping[str, np.ndarray],
    missing: dict[str, int],
) -> Iterator[dict[str, np.ndarray]]:
    for frame in frames:
        views = data.read(frame)["images"]
        for camera in black.keys() - views.keys():
            missing[camera] = missing.get(camera, 0) + 1
        yield {camera: views.get(camera, empty) for camera, empty in black.items()}


def _black_pictures(datasets: Mapping[str, EpisodeDataset]) -> dict[str, np.ndarray]:
    """A picture of zeros for each camera, of the size of its first one."""
    sizes: dict[str, np.ndarray] = {}
    cameras = dict.fromkeys(camera for data in datasets.values() for camera in data.cameras)
    for data in datasets.values():
        for frame in data.episode_starts.tolist():
            if sizes.keys() == cameras.keys():
                return {camera: sizes[camera] for camera in cameras}
            for camera, view in data.read(frame)["images"].items():
                sizes.setdefault(camera, np.zeros_like(view))
    for camera in cameras.keys() - sizes.keys():
        log.warning("no episode begins with a picture of %s; it is left out", camera)
    return {camera: sizes[camera] for camera in cameras if camera in sizes}


def _metadata(data: EpisodeDataset) -> dict[str, list[Any]]:
    """The numbers and texts that are stored for each episode, by their column."""
    found = {}
    for key, column in data.index.columns["episode"].items():
        is_plain = column.kind == "text" or (column.kind == "tensor" and column.shape == ())
        if key not in OWN and is_plain:
            found[key] = data.metadata(key.removeprefix("episode_metadata/")).tolist()
    return found
