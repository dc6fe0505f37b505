"""Chosen episodes of a data set as a map from frame number to sample, read in place.

`EpisodeDataset` is what all formats share: low-dimensional values are memory mapped from the index,
an image costs one positioned read. `RldsDataset` reads TFRecords. Frames are numbered through the
chosen episodes, so a selection has a true length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data.checksum import crc32c
from pizero.data.hashing import mix_bits
from pizero.data.images import decode_image
from pizero.data.index import Index
from pizero.data.rlds.index import open_index
from pizero.data.rlds.tfrecord import CorruptRecordError, FileReader
from pizero.data.select import Filters, parse_split, split_range, subset
from pizero.data.standardize import Rule, Standardized, concatenate, standardized

Sample = dict[str, Any]
Keys = str | Sequence[str]
ON_ERROR = ("raise", "skip")


class EpisodeDataset:
    """Frames of chosen episodes, each with the `horizon` actions that follow it.

    index         the arrays; `chosen` are positions of episodes in it, named by `split` in messages
    cameras       name -> image key of the steps, or several keys, one of which is drawn each time
    state, action one key or several, whose values are concatenated; or `standardize`, a rule on
                  whole episodes that gives both
    text          key of the instruction, or several, one of whose texts that are not empty is drawn
    episodes      narrows the choice: positions among the chosen, or values of metadata, e.g.
                  {"task": ["push", "pick"], "success": True}
    filters       further conditions on episodes and frames
    skip_unlabeled   leave out episodes without instruction
    frames        > 1 adds the frames before, oldest first, repeating the first of the episode
    stride        steps between two frames and between two actions of a chunk
    on_error      what TrainLoader does about a sample that cannot be read: raise, or skip (the next
                  frame takes its place; counted and logged)
    action_mask   dimensions of actions that are normalised, kept with their statistics; None: all
    octo_compat   as Octo has it: the mask of actions past the end begins one action late, and the
                  last of several instructions is never drawn

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
        index: Index,
        chosen: np.ndarray,
        split: str,
        cameras: Mapping[str, Keys],
        horizon: int,
        state: Keys | None = None,
        action: Keys | None = None,
        text: Keys | None = None,
        standardize: Rule | None = None,
        episodes: Sequence[int] | Mapping[str, Any] | None = None,
        filters: Filters | None = None,
        skip_unlabeled: bool = False,
        frames: int = 1,
        stride: int = 1,
        on_error: str = "raise",
        action_mask: Sequence[bool] | None = None,
        octo_compat: bool = False,
    ) -> None:
        for name, value in (("horizon", horizon), ("frames", frames), ("stride", stride)):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        if on_error not in ON_ERROR:
            raise ValueError(f"expected on_error raise or skip, got {on_error!r}")
        self.index, self.split, self.on_error = index, split, on_error
        self.horizon, self.frames, self.stride = horizon, frames, stride
        self.octo_compat = octo_compat
        self.cameras = {name: _as_list(keys) for name, keys in cameras.items()}
        self.text_keys = _as_list(text)
        self._files = FileReader()
        for keys in self.cameras.values():
            for key in keys:
                self._check_camera(key)
        for key in self.text_keys:
            index.step_values(key, "text")
        self._state_keys, self._action_keys = _as_list(state), _as_list(action)
        self.rule = standardize or concatenate(state=self._state_keys, action=self._action_keys)
        self._standard = self._standardized(standardize)
        self.episodes = np.asarray(chosen, np.int64)  # positions in the index
        self._choose(episodes, filters, skip_unlabeled)
        self.action_mask = None if action_mask is None else tuple(bool(m) for m in action_mask)
        if self.action_mask is not None and len(self.action_mask) != self.action_dim:
            raise ValueError(
                f"expected an action_mask of {self.action_dim} entries, got {len(self.action_mask)}"
            )

    def __len__(self) -> int:
        return int(self.episode_lengths.sum())

    def __getitem__(self, i: int) -> Sample:
        return self.read(i)

    @property
    def num_episodes(self) -> int:
        """Chosen episodes."""
        return len(self.episodes)

    def episode_of(self, frames: np.ndarray) -> np.ndarray:
        """The chosen episode, counted from 0, that holds each frame [n]."""
        ends = self.episode_starts + self.episode_lengths
        return np.searchsorted(ends, frames, side="right")

    @property
    def state_table(self) -> np.ndarray:
        """float32 [rows S], mapped; an episode has the rows `starts` .. `starts + lengths`."""
        return self._table("state")

    @property
    def action_table(self) -> np.ndarray:
        """float32 [rows A], mapped."""
        return self._table("action")

    @property
    def state_dim(self) -> int:
        """Width of the state; 0 without one."""
        return self.state_table.shape[1]

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return self.action_table.shape[1]

    @property
    def rows(self) -> np.ndarray | slice:
        """The row of the tables of each frame [frames]."""
        if self._drawn is None and np.array_equal(self.starts, self._firsts + self.starts[0]):
            return slice(int(self.starts[0]), int(self.starts[0] + self.lengths.sum()))
        frames = np.arange(len(self)) if self._drawn is None else self._drawn
        episode = np.searchsorted(self._ends, frames, side="right")
        return frames + (self.starts - self._firsts)[episode]

    @property
    def steps_left(self) -> np.ndarray:
        """How many steps of its episode follow each frame, int64 [frames]."""
        frames = np.arange(len(self)) if self._drawn is None else self._drawn
        return self._ends[np.searchsorted(self._ends, frames, side="right")] - 1 - frames

    @property
    def states(self) -> np.ndarray:
        """float32 [frames S], without decoding an image."""
        return self.state_table[self.rows]

    @property
    def actions(self) -> np.ndarray:
        """float32 [frames A], the action taken at each frame."""
        return self.action_table[self.rows]

    def metadata(self, key: str) -> np.ndarray:
        """One value per chosen episode of `episode_metadata/<key>`, text as str objects."""
        columns = self.index.columns["episode"]
        path = f"episode_metadata/{key}"
        if path not in columns and key in columns:
            path = key  # other formats and makers keep some values elsewhere
        values = self.index.episode_values(path)[self.episodes]
        if columns[path].kind == "text":
            return np.array(self.index.texts(values), object)
        return np.asarray(values)

    def texts(self) -> list[str]:
        """The instruction of each chosen episode, taken at its first step."""
        return [self._text(row, None) for row in self.starts.tolist()]

    def read(self, i: int, *, images: bool = True, draw: int | None = None) -> Sample:
        """The sample of frame `i`; negative numbers count from the end.

        `images` False leaves the pictures out, which take almost all of the time. `draw`, the
        number of the sample, decides between several cameras or texts; None: the first.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"frame {i} of a dataset with {len(self)} frames")
        i = i % len(self)
        frame = i if self._drawn is None else int(self._drawn[i])
        episode = int(np.searchsorted(self._ends, frame, side="right"))
        length, start = int(self.lengths[episode]), int(self.starts[episode])
        step = frame - int(self._firsts[episode])
        past = start + np.maximum(step + self.stride * np.arange(1 - self.frames, 1), 0)
        ahead = step + self.stride * np.arange(self.horizon)
        views = {}
        if images:
            for number, (name, keys) in enumerate(self.cameras.items()):
                key = keys[0] if draw is None else keys[_drawn(draw, number, len(keys))]
                view = self._view(key, episode, past)
                if view is not None:
                    views[name] = view
        return {
            "images": views,
            "state": self.state_table[past],
            "actions": self.action_table[start + np.minimum(ahead, length - 1)],
            "action_is_pad": ahead >= length + self.octo_compat,
            "text": self._text(start + step, draw),
            "episode": episode,
            "step": step,
        }

    def read_many(self, frames: Sequence[int]) -> list[Sample]:
        """The samples of several frames."""
        return [self.read(int(i)) for i in frames]

    __getitems__ = read_many

    def advise(self, episodes: np.ndarray) -> None:
        """Let the kernel read the images of chosen episodes ahead, each in one go."""
        for episode in episodes.tolist():
            rows = self._stored(self.starts[episode] + np.arange(int(self.lengths[episode])))
            path = self.index.files[int(self.index.shard[self.episodes[episode]])]
            for key in {key for keys in self.cameras.values() for key in keys}:
                if len(rows) and self.index.columns["steps"][key].kind == "image":
                    spans = self.index.step_values(key)[rows]
                    first, end = int(spans[:, 0].min()), int(spans.sum(1).max())
                    self._files.advise(path, first, end - first)

    def _view(self, key: str, episode: int, rows: np.ndarray) -> np.ndarray | None:
        """[h w 3], or with history [frames h w 3]; None where an image is empty."""
        pictures = self._pictures(key, episode, self._stored(rows))
        if pictures is None:
            return None
        return pictures[0] if self.frames == 1 else np.stack(pictures)

    def _pictures(self, key: str, episode: int, rows: np.ndarray) -> list[np.ndarray] | None:
        """The image of each row of the index, uint8 [h w 3]; None where one is empty."""
        path = self.index.files[int(self.index.shard[self.episodes[episode]])]
        pictures = []
        crcs = self.index.image_crcs(key)
        for row, (offset, size) in zip(
            rows, self.index.step_values(key)[rows].tolist(), strict=True
        ):
            if not size:
                return None
            data = self._files.read(path, offset, size)
            if crcs is not None and crc32c(data) != crcs[row]:
                raise CorruptRecordError(
                    f"{path}, {key} at offset {offset}: the image changed after it was indexed"
                )
            try:
                pictures.append(decode_image(data))
            except ValueError as error:
                raise ValueError(f"{path}, {key} at offset {offset}: {error}") from error
        return pictures

    def _check_camera(self, key: str) -> None:
        self.index.step_values(key, "image")
        dtype = self.index.columns["steps"][key].dtype
        if dtype not in ("", "uint8"):
            raise ValueError(
                f"{self.index.directory}: expected a camera of uint8 pictures, got {key} of {dtype}"
            )

    def _text(self, row: int, draw: int | None) -> str:
        standard = self._standard
        if standard is not None and standard.texts is not None:
            return standard.strings[int(standard.texts[row])]
        if not self.text_keys:
            return ""
        stored = int(self._stored(np.array([row]))[0])
        columns = [self.index.step_values(key, "text") for key in self.text_keys]
        texts = [self.index.strings[int(column[stored])] for column in columns]
        texts = [text for text in texts if text.strip()] or texts
        if draw is None or len(texts) == 1:
            return texts[0]
        return texts[_drawn(draw, -1, len(texts) - self.octo_compat)]

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the index that rows of the tables come from."""
        moved = None if self._standard is None else self._standard.rows
        return rows if moved is None else moved[rows]

    def _table(self, name: str) -> np.ndarray:
        if self._standard is not None:
            return self._standard.state if name == "state" else self._standard.action
        keys = self._state_keys if name == "state" else self._action_keys
        if not keys:
            return np.zeros((int(self.index.lengths.sum()), 0), np.float32)
        column = self.index.step_values(keys[0], "tensor")
        return column.reshape(len(column), -1)

    def _standardized(self, rule: Rule | None) -> Standardized | None:
        """The result of the rule; None where the index holds the very arrays."""
        if rule is not None:
            if self._state_keys or self._action_keys:
                raise ValueError("expected either standardize or state and action keys, got both")
            return standardized(self.index, rule)
        if not self._action_keys:
            raise ValueError("expected at least one action key, got none")
        keys = (self._state_keys, self._action_keys)
        for key in (*keys[0], *keys[1]):
            self.index.step_values(key, "tensor")
        columns = self.index.columns["steps"]
        if all(len(k) < 2 and all(columns[x].dtype == "float32" for x in k) for k in keys):
            return None
        return standardized(self.index, self.rule)

    def _choose(
        self,
        episodes: Sequence[int] | Mapping[str, Any] | None,
        filters: Filters | None,
        skip_unlabeled: bool,
    ) -> None:
        """Narrow the episodes down, and say which of their frames are drawn."""
        self._keep(np.ones(len(self.episodes), bool))
        if episodes is not None:
            self._keep(subset(episodes, self))
        if skip_unlabeled:
            self._keep(self._labeled())
        if filters is not None:
            self._keep(filters.keep_episodes(self))
        self._keep(self.lengths > 0)
        self._firsts = np.cumsum(self.lengths) - self.lengths
        self._ends = self._firsts + self.lengths
        self._drawn: np.ndarray | None = None
        self.episode_starts, self.episode_lengths = self._firsts, self.lengths
        keep = None if filters is None else filters.keep_frames(self)
        if keep is not None:
            self._drawn = np.flatnonzero(keep)
            ends = np.searchsorted(self._drawn, self._ends)
            self.episode_starts = np.searchsorted(self._drawn, self._firsts)
            self.episode_lengths = ends - self.episode_starts
        if not len(self):
            what = "frame" if self.num_episodes else "episode"
            raise ValueError(f"no {what} of {self.split!r} in {self.index.directory} is selected")

    def _keep(self, keep: np.ndarray) -> None:
        source = self.index if self._standard is None else self._standard
        self.episodes = self.episodes[keep]
        self.starts = np.asarray(source.starts[self.episodes])  # rows of the tables
        self.lengths = np.asarray(source.lengths[self.episodes])

    def _labeled(self) -> np.ndarray:
        standard = self._standard
        if not self.text_keys and (standard is None or standard.texts is None):
            raise ValueError("skip_unlabeled needs a text key; expected text=..., got None")
        return np.array(
            [
                bool(length and self._text(start, None).strip())
                for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
            ],
            bool,
        )


class RldsDataset(EpisodeDataset):
    """One split of an RLDS data set; see EpisodeDataset for the arguments not told of here.

    `cameras` names image keys below `steps/`, as do the other keys. `split` may carry a range as in
    tfds, e.g. `train[:95%]` or `train[10:20]`, counted in episodes. `verify` compares every byte
    with its checksum when the index is made, by `index_workers` processes (None: as fits); damaged
    records are refused, or with `on_error` skip left out.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        split: str,
        cameras: Mapping[str, Keys],
        horizon: int,
        state: Keys | None = None,
        action: Keys | None = None,
        text: Keys | None = None,
        standardize: Rule | None = None,
        episodes: Sequence[int] | Mapping[str, Any] | None = None,
        filters: Filters | None = None,
        skip_unlabeled: bool = False,
        frames: int = 1,
        stride: int = 1,
        on_error: str = "raise",
        action_mask: Sequence[bool] | None = None,
        octo_compat: bool = False,
        verify: bool = True,
        index_workers: int | None = None,
    ) -> None:
        name, first, last = parse_split(split)
        index = open_index(path, name, num_workers=index_workers, verify=verify, on_error=on_error)
        total = len(index.lengths)
        super().__init__(
            index=index,
            chosen=np.arange(total)[split_range(first, last, total)],
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
            stride=stride,
            on_error=on_error,
            action_mask=action_mask,
            octo_compat=octo_compat,
        )


def _as_list(keys: Keys | None) -> list[str]:
    if keys is None:
        return []
    return [keys] if isinstance(keys, str) else list(keys)


def _drawn(draw: int, what: int, count: int) -> int:
    """One of `count` things, as a function of the sample's number."""
    return int(mix_bits(draw, what)) % max(count, 1)
