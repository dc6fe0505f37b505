"""Which episodes are used, and which of their frames are drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Protocol

import numpy as np

from pizero.data.hashing import mix_bits

Limit = float | Sequence[float]


class Episodes(Protocol):
    """What conditions are asked of: an EpisodeDataset."""

    split: str
    horizon: int
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def num_episodes(self) -> int: ...

    @property
    def state_table(self) -> np.ndarray: ...

    @property
    def action_table(self) -> np.ndarray: ...

    def metadata(self, key: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Filters:
    """Conditions on episodes and frames; what fails one is not drawn, and does not count.

    matching        metadata -> regular expression that its text matches as a whole
    max_action      largest absolute action, one number or one for each dimension (inf: any), in
                    the data's units; an episode with a larger one is left out
    max_state       likewise
    idle            frames at whose beginning the robot rests are left out: where no action of the
                    first half of the chunk differs by more than this from the chunk's first one,
                    or, for actions that are changes or velocities (`idle_from_zero`), from 0.
                    openpi's DROID recipe has 1e-3
    ranges          JSON {name of episode: [[first, end], ...]} of steps to keep; episodes that it
                    lacks keep none. openpi's file for DROID is of this form
    ranges_name     how the file names episodes, by their metadata, e.g.
                    "{recording_folderpath}--{file_path}"
    max_frames      frames drawn of each episode, chosen at random once; actions still come from
                    all of it
    min_steps       shortest episode
    """

    matching: Mapping[str, str] | None = None
    max_action: Limit | None = None
    max_state: Limit | None = None
    idle: float | None = None
    idle_from_zero: bool = False
    ranges: str | Path | None = None
    ranges_name: str | None = None
    max_frames: int | None = None
    min_steps: int = 1

    def __post_init__(self) -> None:
        for pattern in (self.matching or {}).values():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"expected a regular expression, got {pattern!r}: {error}"
                ) from error
        if (self.ranges is None) != (self.ranges_name is None):
            raise ValueError("expected ranges and ranges_name together, got one of them")
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"expected max_frames >= 1, got {self.max_frames}")

    def keep_episodes(self, data: Episodes) -> np.ndarray:
        """bool [episodes of the data set], True for those that are used."""
        keep = data.lengths >= self.min_steps
        for key, pattern in (self.matching or {}).items():
            texts = data.metadata(key)
            keep &= np.array([bool(re.fullmatch(pattern, str(t), re.DOTALL)) for t in texts], bool)
        for name, limit, values in (
            ("max_action", self.max_action, data.action_table),
            ("max_state", self.max_state, data.state_table),
        ):
            if limit is not None:
                keep &= ~_any_beyond(values, data.starts, data.lengths, limit, name)
        return keep

    def keep_frames(self, data: Episodes) -> np.ndarray | None:
        """bool [frames of the chosen episodes], True for those that are drawn; None: all."""
        conditions = []
        if self.idle is not None:
            conditions.append(~_rests(data, self.idle, from_zero=self.idle_from_zero))
        if self.ranges is not None:
            conditions.append(self._in_ranges(data))
        keep = np.logical_and.reduce(conditions) if conditions else None
        if self.max_frames is not None:
            return _at_most(data, self.max_frames, keep)
        return keep

    def _in_ranges(self, data: Episodes) -> np.ndarray:
        assert self.ranges is not None
        assert self.ranges_name is not None
        path = Path(self.ranges).expanduser()
        try:
            kept = {
                k: [(int(a), int(b)) for a, b in v] for k, v in json.loads(path.read_text()).items()
            }
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected JSON {{episode: [[first, end], ...]}}, got {error}"
            ) from error
        fields = [name for _, name, _, _ in Formatter().parse(self.ranges_name) if name]
        columns = [data.metadata(field) for field in fields]
        keep = np.zeros(int(data.lengths.sum()), bool)
        found = 0
        first = np.cumsum(data.lengths) - data.lengths
        for episode in range(data.num_episodes):
            # str.format would take the slashes and dots of keys for attributes.
            name = self.ranges_name
            for field, column in zip(fields, columns, strict=True):
                name = name.replace(f"{{{field}}}", str(column[episode]))
            for start, end in kept.get(name, ()):
                stop = min(end, int(data.lengths[episode]))
                keep[first[episode] + start : first[episode] + stop] = True
            found += name in kept
        if not found:
            raise ValueError(
                f"{path} names none of the {data.num_episodes} episodes; expected names like "
                f"{self.ranges_name!r}, it has {next(iter(kept), None)!r}"
            )
        return keep


def subset(selection: Sequence[int] | Mapping[str, object], data: Episodes) -> np.ndarray:
    """bool [episodes of the data set]: those at given positions, or with given metadata."""
    keep = np.ones(data.num_episodes, bool)
    if isinstance(selection, Mapping):
        for key, wanted in selection.items():
            allowed = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
            keep &= np.array([value in allowed for value in data.metadata(key)], bool)
        return keep
    wanted = np.asarray(selection, np.int64)
    if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(keep)):
        raise ValueError(
            f"expected episodes in 0..{len(keep) - 1} of {data.split!r}, got "
            f"{wanted.min()}..{wanted.max()}"
        )
    return np.isin(np.arange(len(keep)), wanted)


def parse_split(split: str) -> tuple[str, str, str]:
    """Name, first and last of a split such as `train`, `train[:95%]` or `train[10:20]`."""
    match = re.fullmatch(r"([\w.]+)(?:\[(\d*%?):(\d*%?)\])?", split)
    if not match:
        raise ValueError(f"expected a split like train, train[:95%] or train[10:20], got {split!r}")
    return match[1], match[2] or "", match[3] or ""


def split_range(first: str, last: str, total: int) -> slice:
    """The episodes that the ends of a split's range stand for."""

    def position(text: str, default: int) -> int:
        if not text:
            return default
        return round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)

    return slice(position(first, 0), position(last, total))


def _any_beyond(
    values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, limit: Limit, name: str
) -> np.ndarray:
    """bool [episodes], True where any value of an episode is beyond the limit."""
    bounds = np.asarray(limit, np.float64)
    if bounds.shape not in ((), values.shape[-1:]):
        raise ValueError(f"expected {name} of {values.shape[-1]} entries, got {limit}")
    beyond = np.zeros(len(starts), bool)
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        beyond[i] = bool((np.abs(values[start : start + length]) > bounds).any())
    return beyond


def _rests(data: Episodes, limit: float, *, from_zero: bool) -> np.ndarray:
    """bool [frames of the chosen episodes]: the first half of the chunk does not move."""
    half = max(1, data.horizon // 2)
    pieces = []
    for start, length in zip(data.starts.tolist(), data.lengths.tolist(), strict=True):
        actions = np.asarray(data.action_table[start : start + length])
        ahead = np.minimum(np.arange(length)[:, None] + np.arange(half), max(length - 1, 0))
        origin = 0 if from_zero else actions[:, None]
        pieces.append((np.abs(actions[ahead] - origin) <= limit).all((1, 2)))
    return np.concatenate(pieces) if pieces else np.zeros(0, bool)


def _at_most(data: Episodes, limit: int, keep: np.ndarray | None) -> np.ndarray:
    """At most so many frames of each episode, of those that are kept."""
    total = int(data.lengths.sum())
    keep = np.ones(total, bool) if keep is None else keep.copy()
    ends = np.cumsum(data.lengths)
    for start, end in zip((ends - data.lengths).tolist(), ends.tolist(), strict=True):
        frames = start + np.flatnonzero(keep[start:end])
        if len(frames) > limit:
            order = np.argsort(mix_bits(0, frames), kind="stable")
            keep[frames[order[limit:]]] = False
    return keep
