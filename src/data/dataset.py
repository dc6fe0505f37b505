"""One RLDS split as a map from frame number to sample, read in place.

Low-dimensional values are memory mapped from the index; an image costs one positioned read. Frames
are numbered through the chosen episodes, so a selection has a true length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data.images import decode_image
from pizero.data.rlds.index import Index, open_index
from pizero.data.rlds.tfrecord import FileReader

Sample = dict[str, Any]
Keys = str | Sequence[str]


class RldsDataset:
    """Frames of a split, each with the `horizon` actions that follow it.

    `cameras` names image keys below `steps/`; `state` and `action` name one key or several whose
    values are concatenated; `text` names the instruction. `split` may carry a range as in tfds,
    e.g. `train[:95%]` or `train[10:20]`, counted in episodes. `episodes` narrows that further, to
    positions in the split or by metadata: `{"task": ["push", "pick"], "success": True}`.
    `frames` > 1 adds the frames before, oldest first, repeating the first of the episode.

    `read(i)` gives
        images          {camera: uint8 [h w 3]}; [frames h w 3] if frames > 1; absent if missing
        state           float32 [frames S]
        actions         float32 [horizon A], the last action repeated past the end of the episode
        action_is_pad   bool [horizon], True past the end
        text, episode, step
    """

    def __init__(
        self,
        *,
        path: str | Path,
        split: str,
        cameras: Mapping[str, str],
        action: Keys,
        horizon: int,
        state: Keys | None = None,
        text: str | None = None,
        episodes: Sequence[int] | Mapping[str, Any] | None = None,
        frames: int = 1,
        skip_unlabeled: bool = False,
        index_workers: int = 0,
    ) -> None:
        for name, value in (("horizon", horizon), ("frames", frames)):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        name, first, last = _parse_split(split)
        self.split, self.horizon, self.frames = split, horizon, frames
        self.index: Index = open_index(path, name, num_workers=index_workers)
        self.cameras = dict(cameras)
        self._state_keys = _as_list(state)
        self._action_keys = _as_list(action)
        self._text_key = text
        self._files = FileReader()
        for key in self.cameras.values():
            self.index.step_values(key, "image")
        for key in self._state_keys + self._action_keys:
            self.index.step_values(key, "tensor")
        if text is not None:
            self.index.step_values(text, "text")
        if not self._action_keys:
            raise ValueError("expected at least one action key, got none")
        chosen = np.arange(len(self.index.lengths))[_range(first, last, len(self.index.lengths))]
        chosen = self._select(chosen, episodes)
        if skip_unlabeled:
            chosen = chosen[self._labeled(chosen)]
        if not len(chosen):
            raise ValueError(f"no episode of {split!r} in {self.index.directory} is selected")
        self.episodes = chosen
        self._starts = np.asarray(self.index.starts[chosen])  # rows of the index
        self.episode_lengths = np.asarray(self.index.lengths[chosen])  # frames of each episode
        self._ends = np.cumsum(self.episode_lengths)
        self.episode_starts = self._ends - self.episode_lengths  # first frame of each episode

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Sample:
        return self.read(i)

    @property
    def num_episodes(self) -> int:
        """Chosen episodes."""
        return len(self.episodes)

    def episode_of(self, frames: np.ndarray) -> np.ndarray:
        """The chosen episode, counted from 0, that holds each frame [n]."""
        return np.searchsorted(self._ends, frames, side="right")

    @property
    def state_dim(self) -> int:
        """Width of the state; 0 without one."""
        return sum(self._width(key) for key in self._state_keys)

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return sum(self._width(key) for key in self._action_keys)

    @property
    def states(self) -> np.ndarray:
        """float32 [frames of the dataset, state_dim], without decoding an image."""
        return self._values(self._state_keys, self._rows())

    @property
    def actions(self) -> np.ndarray:
        """float32 [frames of the dataset, action_dim], the action taken at each frame."""
        return self._values(self._action_keys, self._rows())

    def metadata(self, key: str) -> np.ndarray:
        """One value per chosen episode of `episode_metadata/<key>`, text as str objects."""
        return self._metadata(key)[self.episodes]

    def texts(self) -> list[str]:
        """The instruction of each chosen episode, taken at its first step."""
        return self._first_texts(self.episodes)

    def read(self, i: int, *, images: bool = True) -> Sample:
        """The sample of frame `i`; negative numbers count from the end.

        `images` False leaves the pictures out, which take almost all of the time.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"frame {i} of a dataset with {len(self)} frames")
        i = i % len(self)
        episode = int(np.searchsorted(self._ends, i, side="right"))
        length = int(self.episode_lengths[episode])
        step = i - int(self.episode_starts[episode])
        start = int(self._starts[episode])
        past = start + np.maximum(np.arange(step - self.frames + 1, step + 1), 0)
        ahead = np.arange(step, step + self.horizon)
        cameras = self.cameras if images else {}
        views = {name: self._image(key, episode, past) for name, key in cameras.items()}
        return {
            "images": {name: view for name, view in views.items() if view is not None},
            "state": self._values(self._state_keys, past),
            "actions": self._values(self._action_keys, start + np.minimum(ahead, length - 1)),
            "action_is_pad": ahead >= length,
            "text": self._text(start + step),
            "episode": episode,
            "step": step,
        }

    def read_many(self, frames: Sequence[int]) -> list[Sample]:
        """The samples of several frames."""
        return [self.read(int(i)) for i in frames]

    __getitems__ = read_many

    def _image(self, key: str, episode: int, rows: np.ndarray) -> np.ndarray | None:
        """[h w 3], or with history [frames h w 3]; None where the image is empty."""
        path = self.index.files[int(self.index.shard[self.episodes[episode]])]
        decoded = []
        for offset, size in self.index.step_values(key)[rows].tolist():
            if not size:
                return None
            data = self._files.read(path, offset, size)
            try:
                decoded.append(decode_image(data))
            except ValueError as error:
                raise ValueError(f"{path}, {key} at offset {offset}: {error}") from error
        return decoded[0] if self.frames == 1 else np.stack(decoded)

    def _text(self, row: int) -> str:
        if self._text_key is None:
            return ""
        return self.index.strings[int(self.index.step_values(self._text_key, "text")[row])]

    def _values(self, keys: list[str], rows: np.ndarray | slice) -> np.ndarray:
        columns = [self.index.step_values(key)[rows] for key in keys]
        flat = [c.reshape(len(c), -1).astype(np.float32, copy=False) for c in columns]
        if len(flat) == 1:
            return np.asarray(flat[0])
        if flat:
            return np.concatenate(flat, axis=1)
        return np.zeros((len(self) if isinstance(rows, slice) else len(rows), 0), np.float32)

    def _rows(self) -> np.ndarray | slice:
        """Rows of the step tables that belong to the chosen episodes."""
        if np.array_equal(self._starts, self.episode_starts + self._starts[0]):
            return slice(int(self._starts[0]), int(self._starts[0]) + len(self))
        return np.arange(len(self)) + np.repeat(
            self._starts - self.episode_starts, self.episode_lengths
        )

    def _width(self, key: str) -> int:
        return int(np.prod(self.index.step_values(key).shape[1:], dtype=np.int64))

    def _metadata(self, key: str) -> np.ndarray:
        path = f"episode_metadata/{key}"
        if path not in self.index.spec.episode and key in self.index.spec.episode:
            path = key  # datasets of other makers keep some values outside episode_metadata
        values = self.index.episode_values(path)
        if self.index.spec.episode[path].kind == "text":
            return np.array(self.index.texts(values), object)
        return np.asarray(values)

    def _first_texts(self, episodes: np.ndarray) -> list[str]:
        if self._text_key is None:
            return [""] * len(episodes)
        column = self.index.step_values(self._text_key, "text")
        return self.index.texts(column[self.index.starts[episodes]])

    def _labeled(self, episodes: np.ndarray) -> np.ndarray:
        if self._text_key is None:
            raise ValueError("skip_unlabeled needs a text key; expected text=..., got None")
        return np.array([bool(text.strip()) for text in self._first_texts(episodes)], bool)

    def _select(
        self, chosen: np.ndarray, selection: Sequence[int] | Mapping[str, Any] | None
    ) -> np.ndarray:
        if selection is None:
            return chosen
        if not isinstance(selection, Mapping):
            wanted = np.asarray(selection, np.int64)
            if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(chosen)):
                raise ValueError(
                    f"expected episodes in 0..{len(chosen) - 1} of {self.split!r}, got "
                    f"{wanted.min()}..{wanted.max()}"
                )
            return chosen[np.sort(wanted)]
        for key, wanted in selection.items():
            values = self._metadata(key)[chosen]
            allowed = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
            chosen = chosen[np.array([value in allowed for value in values], bool)]
        return chosen


def _as_list(keys: Keys | None) -> list[str]:
    if keys is None:
        return []
    return [keys] if isinstance(keys, str) else list(keys)


def _parse_split(split: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"([\w.]+)(?:\[(\d*%?):(\d*%?)\])?", split)
    if not match:
        raise ValueError(f"expected a split like train, train[:95%] or train[10:20], got {split!r}")
    return match[1], match[2] or "", match[3] or ""


def _range(first: str, last: str, total: int) -> slice:
    def position(text: str, default: int) -> int:
        if not text:
            return default
        return round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)

    return slice(position(first, 0), position(last, total))
