"""Write LeRobot data sets of version 3.0 that LeRobot itself opens.

Everything is written into a hidden folder beside the set's place, which gets its name when it is
whole. A writer that was killed leaves the folder behind; the next one for that place starts over.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pizero.data.files import write_whole
from pizero.data.images import encode_image
from pizero.data.lerobot.checksums import write_checksums
from pizero.data.lerobot.describe import PixelCounts, describe_values
from pizero.data.lerobot.encode import GOP, check_codec, default_codec
from pizero.data.lerobot.files import INFO, read_table
from pizero.data.lerobot.parts import (
    CHUNK,
    DATA_PATH,
    EPISODES_PATH,
    VIDEO_PATH,
    TableFiles,
    VideoFiles,
    tasks_table,
    with_types,
    write_table,
)
from pizero.data.lerobot.video import probe_video

AUTOMATIC = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
STORED = {"video": "video", "parquet": "image"}  # where pictures go, and LeRobot's word for it
WRITE_EVERY = 100  # episodes; what is said of them is kept in memory for as long

log = logging.getLogger(__name__)


class LeRobotWriter:
    """Collects episodes into a data set at `path`, which `finish` gives its name.

    fps          frames per second, a whole number
    images       `video`, one file of a camera for many episodes, or `parquet`, PNG in the tables
    codec, crf, gop      of videos, see VideoEncoder; codec None: AV1 where it can be encoded
    data_mb, video_mb    a file of at least that size is not added to
    overwrite    replace what is at `path`

        with LeRobotWriter("data/mine", fps=10) as writer:
            writer.add_episode(frames, state=state, actions=actions, text="pick up the cup")
            writer.finish()
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float,
        images: str = "video",
        codec: str | None = None,
        crf: int | None = None,
        gop: int = GOP,
        robot_type: str | None = None,
        data_mb: int = 100,
        video_mb: int = 200,
        overwrite: bool = False,
    ) -> None:
        if fps != int(fps) or fps < 1:
            raise ValueError(f"expected fps as a whole number, which LeRobot wants, got {fps}")
        if images not in STORED:
            raise ValueError(f"expected images {' or '.join(STORED)}, got {images!r}")
        self.path, self.fps, self.robot_type = Path(path), int(fps), robot_type
        self.images, self.data_mb, self.video_mb = images, data_mb, video_mb
        codec = codec or default_codec()
        if images == "video":
            check_codec(codec)
        self._options = {"fps": self.fps, "codec": codec, "crf": crf, "gop": gop}
        self._overwrite = overwrite
        self._refuse_existing()
        self._folder = self.path.with_name(f".{self.path.name}.writing")
        self._lock: int | None = _start_over(self._folder)
        self._features: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, int] = {}
        self._episodes = self._frames = 0
        self._rows: list[dict[str, Any]] = []  # of meta/episodes, not yet written
        self._pixels: dict[str, PixelCounts] = {}
        self._data = TableFiles(self._folder, DATA_PATH, largest=data_mb * 2**20)
        self._meta = TableFiles(self._folder, EPISODES_PATH, largest=data_mb * 2**20)
        self._videos: dict[str, VideoFiles] = {}

    def add_episode(
        self,
        frames: Iterable[Mapping[str, np.ndarray]],
        *,
        actions: np.ndarray,
        text: str | Sequence[str],
        state: np.ndarray | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one episode; all must have the cameras and widths of the first.

        `frames` gives {camera: uint8 [h w 3]} of each step, whose feature will be
        `observation.images.<camera>`. `state` [T S], `actions` [T A], `text` for all steps or for
        each. `metadata` are numbers or texts, kept as further columns of meta/episodes.
        """
        length, number = len(actions), self._episodes
        columns = {} if state is None else {"observation.state": np.asarray(state, np.float32)}
        columns["action"] = np.asarray(actions, np.float32)
        texts = [text] * length if isinstance(text, str) else list(text)
        for name, values in (*columns.items(), ("text", texts)):
            if len(values) != length or not length:
                raise ValueError(
                    f"episode {number}: expected {length or 'some'} steps of {name}, got "
                    f"{len(values)}"
                )
        self._expect({key: _vector(number, key, values) for key, values in columns.items()})
        columns |= {
            "timestamp": (np.arange(length) / self.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": self._frames + np.arange(length),
            "task_index": np.array([self._tasks.setdefault(t, len(self._tasks)) for t in texts]),
        }
        pictures, places, described = self._add_pictures(frames, length)
        described |= {key: describe_values(values) for key, values in columns.items()}
        file = self._data.count
        self._data.write(_table(columns, pictures))
        self._rows.append(
            {
                "episode_index": number,
                "tasks": list(dict.fromkeys(texts)),
                "length": length,
                "data/chunk_index": file // CHUNK,
                "data/file_index": file % CHUNK,
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + length,
                **places,
                "meta/episodes/chunk_index": self._meta.count // CHUNK,
                "meta/episodes/file_index": self._meta.count % CHUNK,
                **(metadata or {}),
                **{f"stats/{k}/{name}": v for k, d in described.items() for name, v in d.items()},
            }
        )
        self._episodes, self._frames = number + 1, self._frames + length
        if len(self._rows) == WRITE_EVERY:
            self._write_rows()

    def finish(self, splits: Mapping[str, int] | None = None) -> Path:
        """Write the rest and give the set its name; returns its folder.

        `splits` says how many of the episodes, in order, each split has; None: all are `train`.
        """
        splits = {"train": self._episodes} if splits is None else dict(splits)
        if not self._episodes or sum(splits.values()) != self._episodes:
            raise ValueError(
                f"expected splits of all {self._episodes} episodes, at least one, got {splits}"
            )
        self._close_files()
        write_table(self._folder / "meta/tasks.parquet", tasks_table(self._tasks))
        statistics = json.dumps(self._whole_statistics(), indent=4)
        write_whole(self._folder / "meta/stats.json", statistics)
        write_whole(self._folder / INFO, json.dumps(self._info(splits), indent=4))
        files = [p for p in self._folder.rglob("*") if p.is_file()]
        write_checksums(self._folder, [p.relative_to(self._folder).as_posix() for p in files])
        for path in (self._folder, *self._folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        self._refuse_existing()  # it may have come in the meantime
        shutil.rmtree(self.path, ignore_errors=True)
        os.rename(self._folder, self.path)
        self.close()
        return self.path

    def close(self) -> None:
        """Release the files; what `finish` has not given its name is dropped."""
        if self._lock is not None:
            self._close_files()
            shutil.rmtree(self._folder, ignore_errors=True)
            _lock_file(self._folder).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _expect(self, features: Mapping[str, dict[str, Any]], *, cameras: bool = False) -> None:
        """The first episode says which features there are; the others must have the same."""
        known = {k: f for k, f in self._features.items() if (len(f["shape"]) == 3) == cameras}
        if not self._episodes:
            # cameras first, as LeRobot has them
            self._features = {**features, **self._features}
        elif known != features:
            raise ValueError(
                f"episode {self._episodes}: expected {_words(known)} as before, got "
                f"{_words(features)}"
            )

    def _add_pictures(
        self, frames: Iterable[Mapping[str, np.ndarray]], length: int
    ) -> tuple[dict[str, list[bytes]], dict[str, Any], dict[str, dict[str, Any]]]:
        """Encode an episode's pictures: PNG bytes, or places in videos; and their statistics."""
        stored: dict[str, list[bytes]] = {}
        places: dict[str, Any] = {}
        pixels: dict[str, PixelCounts] = {}
        count = 0
        for views in frames:
            views = {f"observation.images.{camera}": image for camera, image in views.items()}
            if count == 0:
                pixels = {key: PixelCounts() for key in views}
                places = self._begin_pictures(views, length)
            self._check_pictures(views, pixels.keys(), count)
            for key, image in views.items():
                pixels[key].add(image)
                if self.images == "video":
                    self._videos[key].add(image)
                else:
                    stored.setdefault(key, []).append(encode_image(image, encoding="png"))
            count += 1
        if count != length:
            raise ValueError(
                f"episode {self._episodes}: expected {length} steps of pictures, got {count}"
            )
        for key, counted in pixels.items():
            self._pixels.setdefault(key, PixelCounts()).merge(counted)
            if key in self._videos:
                self._videos[key].end_episode()
        return stored, places, {key: counted.describe() for key, counted in pixels.items()}

    def _begin_pictures(self, views: Mapping[str, np.ndarray], length: int) -> dict[str, Any]:
        names = ["height", "width", "channels"]
        kind = {"dtype": STORED[self.images], "names": names}
        self._expect({k: {**kind, "shape": list(x.shape)} for k, x in views.items()}, cameras=True)
        places = {}
        for key in views if self.images == "video" else ():
            video = self._videos.get(key)
            if video is None:
                size = self.video_mb * 2**20
                video = VideoFiles(self._folder, key, largest=size, options=self._options)
                self._videos[key] = video
            places |= {
                f"videos/{key}/chunk_index": video.count // CHUNK,
                f"videos/{key}/file_index": video.count % CHUNK,
                f"videos/{key}/from_timestamp": video.frames / self.fps,
                f"videos/{key}/to_timestamp": (video.frames + length) / self.fps,
            }
        return places

    def _check_pictures(
        self, views: Mapping[str, np.ndarray], expected: Iterable[str], step: int
    ) -> None:
        where = f"episode {self._episodes}, step {step}"
        if set(views) != set(expected):
            raise ValueError(
                f"{where}: expected pictures of {', '.join(expected) or 'no camera'}, got "
                f"{', '.join(views) or 'none'}"
            )
        for key, image in views.items():
            shape = self._features[key]["shape"]
            if image.dtype != np.uint8 or list(image.shape) != shape or shape[2:] != [3]:
                raise ValueError(
                    f"{where}, {key}: expected uint8 {shape[:2]} x 3, got {image.dtype} "
                    f"{list(image.shape)}"
                )

    def _write_rows(self) -> None:
        if self._rows:
            self._meta.write(pa.Table.from_pylist(self._rows))
            self._rows = []

    def _close_files(self) -> None:
        self._write_rows()
        for files in (self._data, self._meta, *self._videos.values()):
            files.close()

    def _info(self, splits: Mapping[str, int]) -> dict[str, Any]:
        features = dict(self._features)
        for key, video in self._videos.items():
            features[key] = features[key] | {"info": video_info(video.first)}
        ends = np.cumsum(list(splits.values())).tolist()
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": self._episodes,
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": self.data_mb,
            "video_files_size_in_mb": self.video_mb,
            "fps": self.fps,
            "splits": {
                name: f"{end - count}:{end}"
                for (name, count), end in zip(splits.items(), ends, strict=True)
            },
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._videos else None,
            "features": features
            | {key: {"dtype": d, "shape": [1], "names": None} for key, d in AUTOMATIC.items()},
        }

    def _whole_statistics(self) -> dict[str, Any]:
        """Of all episodes; numbers are read back from the files, one column at a time."""
        found = {key: counts.describe() for key, counts in self._pixels.items()}
        widths = {k: f["shape"][0] for k, f in self._features.items() if len(f["shape"]) == 1}
        for key, width in {**widths, **dict.fromkeys(AUTOMATIC, 1)}.items():
            columns = [read_table(path, key.__eq__).column(key) for path in self._data.paths]
            arrays = [array for column in columns for array in column.chunks]
            flat = [a if pa.types.is_primitive(a.type) else a.flatten() for a in arrays]
            values = np.concatenate([a.to_numpy(zero_copy_only=False) for a in flat])
            found[key] = describe_values(values.reshape(-1, width))
        return found

    def _refuse_existing(self) -> None:
        if self.path.exists() and not self._overwrite:
            raise ValueError(f"{self.path} exists already; expected a new place, or overwrite")


def video_info(path: Path) -> dict[str, Any]:
    """What `features` says of a camera's videos, from one of them."""
    facts = probe_video(path)
    return {
        "video.height": facts.height,
        "video.width": facts.width,
        "video.codec": facts.codec,
        "video.pix_fmt": facts.pix_fmt,
        "video.is_depth_map": False,
        "video.fps": round(facts.fps),
        "video.channels": 3,
        "has_audio": False,
    }


def _vector(number: int, key: str, values: np.ndarray) -> dict[str, Any]:
    if values.ndim != 2:
        raise ValueError(f"episode {number}: expected {key} as [T d], got {list(values.shape)}")
    return {"dtype": "float32", "shape": [values.shape[1]], "names": None}


def _words(features: Mapping[str, dict[str, Any]]) -> str:
    return ", ".join(f"{key} {f['shape']}" for key, f in sorted(features.items())) or "none"


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _table(columns: Mapping[str, np.ndarray], pictures: Mapping[str, list[bytes]]) -> pa.Table:
    arrays: dict[str, pa.Array] = {
        key: pa.array([{"bytes": data, "path": None} for data in values], _IMAGE)
        for key, values in pictures.items()
    }
    for key, values in columns.items():
        flat = pa.array(values.reshape(-1))
        width = values.shape[1] if values.ndim == 2 else 1  # LeRobot has vectors of one as numbers
        arrays[key] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    return with_types(pa.table(arrays))


def _start_over(folder: Path) -> int:
    """Make an empty folder that this process alone writes; returns the lock's descriptor."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(_lock_file(folder), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ValueError(f"{folder} is being written by another process") from error
    if folder.exists():
        log.warning("%s was left by a writer that did not finish; starting over", folder)
        shutil.rmtree(folder)
    folder.mkdir()
    return lock


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
