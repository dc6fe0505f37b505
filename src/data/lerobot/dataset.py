"""LeRobot data sets of version 2.0, 2.1 and 3.0 as frames of episodes, read without LeRobot."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data.dataset import EpisodeDataset, Keys
from pizero.data.index import Index, unknown_key
from pizero.data.lerobot.index import open_index
from pizero.data.lerobot.video import LONG_GOP, TOLERANCE, VideoReader
from pizero.data.select import Filters, parse_split, split_range
from pizero.data.standardize import Rule

STATE, ACTION, TASK = "observation.state", "action", "task"

log = logging.getLogger(__name__)


class LeRobotDataset(EpisodeDataset):
    """One split of a LeRobot set; see EpisodeDataset for the arguments not told of here.

    path           a folder, or the Hub's name of a set that is on this machine (`revision` chooses
                   among its snapshots); nothing is downloaded
    cameras        name -> feature, e.g. {"wrist": "observation.images.wrist"}: videos or images
    text           `task`, another feature of texts, or an annotation such as
                   `language_persistent.subtask`
    split          of `splits` in meta/info.json, by default `train`, which is usually all; with a
                   range as in train[:95%]
    seconds        between two actions of a chunk, and between two frames; None: as recorded. A
                   whole number of the set's frames, to within `tolerance_s`
    tolerance_s    how far times may be from frame number / fps
    video_backend  torchcodec or pyav; None: torchcodec where it loads
    verify         compare files with SHA256SUMS, where there is one, and values with the recorded
                   statistics, when the index is made by `index_workers` processes
    on_error       skip leaves out episodes whose data file or video cannot be read
    """

    def __init__(
        self,
        *,
        path: str | Path,
        cameras: Mapping[str, Keys],
        horizon: int,
        split: str = "train",
        state: Keys | None = STATE,
        action: Keys | None = ACTION,
        text: Keys | None = TASK,
        standardize: Rule | None = None,
        episodes: Sequence[int] | Mapping[str, Any] | None = None,
        filters: Filters | None = None,
        skip_unlabeled: bool = False,
        frames: int = 1,
        seconds: float | None = None,
        on_error: str = "raise",
        action_mask: Sequence[bool] | None = None,
        tolerance_s: float = TOLERANCE,
        video_backend: str | None = None,
        revision: str | None = None,
        verify: bool = True,
        index_workers: int | None = None,
    ) -> None:
        index = open_index(
            path,
            revision=revision,
            tolerance_s=tolerance_s,
            verify=verify,
            on_error=on_error,
            num_workers=index_workers,
        )
        self._videos = VideoReader(backend=video_backend, tolerance_s=tolerance_s)
        self.fps = float(index.facts["fps"])
        chosen = _chosen(index, split)
        keys = [
            k for named in cameras.values() for k in ([named] if isinstance(named, str) else named)
        ]
        if on_error == "skip":
            chosen = _readable(index, chosen, keys)
        if standardize is not None:  # it names its own keys
            state, action = None if state == STATE else state, None if action == ACTION else action
        super().__init__(
            index=index,
            chosen=chosen,
            split=split,
            cameras=cameras,
            horizon=horizon,
            state=state,
            action=action,
            text=text,
            standardize=standardize,
            episodes=episodes,
            filters=filters,
            skip_unlabeled=skip_unlabeled,
            frames=frames,
            stride=_stride(seconds, self.fps, max(frames, horizon), tolerance_s),
            on_error=on_error,
            action_mask=action_mask,
        )
        for key in self._video_keys(keys):
            unreadable = index.step_values(key)[self.episodes, 0] < 0
            if unreadable.any():
                count, reasons = int(unreadable.sum()), index.facts["problems"][key][:3]
                raise ValueError(
                    f"{index.directory}: {count} of {len(unreadable)} episodes lack their video of "
                    f"{key}: {'; '.join(reasons)}"
                )
            _warn_of_long_gop(str(index.directory), key, index.facts["gop"][key])

    def _pictures(self, key: str, episode: int, rows: np.ndarray) -> list[np.ndarray] | None:
        if self.index.columns["steps"][key].kind != "video":
            return super()._pictures(key, episode, rows)
        position = self.episodes[episode]
        file, first = self.index.step_values(key)[position].tolist()
        frames = first + rows - int(self.index.starts[position])
        return list(self._videos.read(self.index.files[file], frames))

    def _check_camera(self, key: str) -> None:
        if not self._video_keys([key]):
            columns = self.index.columns["steps"]
            visual = [k for k, column in columns.items() if column.kind in ("image", "video")]
            if key not in visual and f"steps.{key}" not in self.index.manifest["absent"]:
                raise unknown_key(key, visual, where=f"{self.index.directory}, cameras,")
            super()._check_camera(key)

    def _video_keys(self, keys: Sequence[str]) -> list[str]:
        columns = self.index.columns["steps"]
        return [key for key in keys if key in columns and columns[key].kind == "video"]


def _chosen(index: Index, split: str) -> np.ndarray:
    """Positions of the split's episodes in the index."""
    name, first, last = parse_split(split)
    splits = index.facts["splits"]
    if name not in splits:
        raise unknown_key(name, splits, where=f"{index.directory}, splits,")
    start, end = splits[name]
    return np.arange(start, end)[split_range(first, last, end - start)]


def _readable(index: Index, chosen: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Of the episodes those whose videos can all be read."""
    columns = index.columns["steps"]
    keep = np.ones(len(chosen), bool)
    for key in keys:
        if key in columns and columns[key].kind == "video":
            keep &= index.step_values(key)[chosen, 0] >= 0
            for problem in index.facts["problems"].get(key, [])[:20]:
                log.warning("left out: %s", problem)
    if not keep.all():
        log.warning(
            "%d of %d episodes of %s lack a video", (~keep).sum(), len(keep), index.directory
        )
    return chosen[keep]


def _stride(seconds: float | None, fps: float, longest: int, tolerance_s: float) -> int:
    """How many of the set's frames lie between two steps that are `seconds` apart."""
    if seconds is None:
        return 1
    stride = round(seconds * fps)
    if stride < 1 or abs(seconds - stride / fps) * max(longest - 1, 1) > tolerance_s:
        near = sorted({max(1, math.floor(seconds * fps)), max(1, math.ceil(seconds * fps))})
        fitting = " or ".join(f"{n / fps:.6g}" for n in near)
        raise ValueError(
            f"expected seconds to be a whole number of frames at {fps:g} frames per second, within "
            f"{tolerance_s:g} s over {longest} steps, got {seconds:g}, which is "
            f"{seconds * fps:.4g} frames; near it are {fitting}"
        )
    return stride


@cache  # once for each set and camera
def _warn_of_long_gop(directory: str, key: str, gop: int) -> None:
    if gop > LONG_GOP:
        log.warning(
            "%s, %s: up to %d frames from one key frame to the next, about half of which must be "
            "decoded for each one drawn at random; scripts/reencode_videos.py makes it 2",
            *(directory, key, gop),
        )
