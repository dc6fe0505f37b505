"""Write RLDS datasets that tfds opens, one durable episode at a time.

While a collection runs, episodes are appended to one part file per split, each under a key. A run
that is killed loses at most the episode it was writing: opening the writer again on the same
directory cuts off the torn tail, and `key in writer` tells what is there already. `finish` then
orders the episodes by key, so the result does not depend on the order in which they arrived, and
writes shards, `features.json`, the keys (`episodes.json`) and last `dataset_info.json`, which marks
the dataset as complete.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data.images import encode_image
from pizero.data.index import unknown_key
from pizero.data.rlds.example import Value, encode_example
from pizero.data.rlds.spec import DatasetSpec, FeatureSpec
from pizero.data.rlds.tfrecord import FOOTER_BYTES, HEADER_BYTES, frame_record

PARTS = ".parts"
METADATA = "episode_metadata"


class RldsWriter:
    """Collects episodes into `<directory>/<name>/<version>`.

    `features` maps flat keys (`steps/observation/state`, `episode_metadata/task`) to FeatureSpec.
    `shards` is the number of files of each split. One process writes at a time; a second one is
    refused.

        writer = RldsWriter(data, name="demo", features=features, splits=("train", "val"))
        if key not in writer:
            writer.add_episode("train", steps, {"task": "push"}, key=key)
        writer.finish()
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        name: str,
        features: Mapping[str, FeatureSpec],
        splits: Sequence[str] = ("train", "val"),
        version: str = "1.0.0",
        shards: int = 1,
        image_quality: int = 95,
    ) -> None:
        if shards < 1:
            raise ValueError(f"expected shards >= 1, got {shards}")
        self.path = Path(directory) / name / version
        self.name, self.version = name, version
        self.splits, self.shards, self.image_quality = tuple(splits), shards, image_quality
        self.spec = DatasetSpec.from_flat(features)
        self._parts = self.path / PARTS
        self._entries: dict[str, dict[str, Any]] = {}  # split, offset and size by key
        self._files: dict[str, Any] = {}
        self.is_finished = (self.path / "dataset_info.json").exists()
        if self.is_finished:
            listed = self.path / "episodes.json"  # absent where another program wrote the dataset
            stored = json.loads(listed.read_text()) if listed.exists() else {}
            self._entries = {k: {"split": split} for split in stored for k in stored[split]}
        else:
            self._parts.mkdir(parents=True, exist_ok=True)
            try:
                self._take_lock()
                self._recover()
            except BaseException:
                self.close()
                raise

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self, split: str | None = None) -> list[str]:
        """Keys of the stored episodes, sorted."""
        return sorted(k for k, e in self._entries.items() if split in (None, e["split"]))

    def add_episode(
        self,
        split: str,
        steps: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
    ) -> str:
        """Append one episode durably and return its key.

        `steps` maps flat or nested keys below `steps/` to T values: uint8 arrays [T h w 3] or lists
        of encoded bytes for images, a string or T strings for text, arrays [T ...] or one scalar
        for numbers. `is_first` and `is_last` are filled in. `metadata` gives the keys below
        `episode_metadata/`, or full keys of other episode features. Without `key`, episodes are
        numbered.
        """
        if self.is_finished:
            raise ValueError(f"{self.path} is finished; write to another version to add episodes")
        if split not in self.splits:
            raise unknown_key(split, self.splits, where="this writer")
        key = f"{len(self._entries):08d}" if key is None else key
        if key in self._entries:
            raise ValueError(f"episode {key!r} is already stored in {self.path}")
        record = frame_record(self._encode(_flatten(steps), _flatten(metadata or {})))
        part = self._files[split]
        entry = {"key": key, "split": split, "offset": part.tell(), "size": len(record)}
        _append(part, record)
        _append(self._files[PARTS], (json.dumps(entry) + "\n").encode())
        self._entries[key] = entry
        return key

    def finish(self) -> Path:
        """Write the dataset from the stored episodes and remove the parts; returns its folder."""
        if self.is_finished:
            return self.path
        splits = [self._write_split(split) for split in self.splits]
        _write_json(self.path / "features.json", self.spec.to_json())
        stored = {split: self.keys(split) for split in self.splits}  # in the order of the records
        _write_json(self.path / "episodes.json", stored)
        info = {
            "fileFormat": "tfrecord",
            "moduleName": "pizero.data.rlds.writer",
            "name": self.name,
            "splits": splits,
            "version": self.version,
        }
        _write_json(self.path / "dataset_info.json", info)
        self.is_finished = True
        self.close()
        return self.path

    def close(self) -> None:
        """Release the files; stored episodes stay for the next writer."""
        if self.is_finished:
            shutil.rmtree(self._parts, ignore_errors=True)
        for file in self._files.values():
            file.close()
        self._files = {}

    def __enter__(self) -> RldsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_lock(self) -> None:
        lock = self._files[".lock"] = (self._parts / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{self.path} is being written by another process") from error

    def _recover(self) -> None:
        """Open the part files, forgetting whatever a killed writer left half written."""
        features, log = self._parts / "features.json", self._parts / "episodes.jsonl"
        tree = json.loads(json.dumps(self.spec.to_json()))
        if features.exists() and json.loads(features.read_text()) != tree:
            raise ValueError(
                f"{self.path} holds episodes with other features than these; finish it with the "
                f"features it was begun with, or delete {self._parts}"
            )
        _write_json(features, tree)
        lines = log.read_bytes() if log.exists() else b""
        lines = lines[: lines.rfind(b"\n") + 1]
        ends = dict.fromkeys(self.splits, 0)
        for line in lines.splitlines():
            entry = json.loads(line)
            if entry["split"] not in ends:
                raise unknown_key(entry["split"], self.splits, where=f"the writer of {self.path}")
            self._entries[entry["key"]] = entry
            ends[entry["split"]] = entry["offset"] + entry["size"]
        self._files |= {split: _open_at(self._part(split), end) for split, end in ends.items()}
        self._files[PARTS] = _open_at(log, len(lines))

    def _part(self, split: str) -> Path:
        return self._parts / f"{split}.tfrecord"

    def _write_split(self, split: str) -> dict[str, Any]:
        keys = self.keys(split)
        if len(keys) < self.shards:
            raise ValueError(
                f"split {split!r} of {self.path} has {len(keys)} episodes for {self.shards} shards"
            )
        bounds = [len(keys) * i // self.shards for i in range(self.shards + 1)]
        payload_bytes = 0
        with self._part(split).open("rb") as part:
            for shard, (start, end) in enumerate(itertools.pairwise(bounds)):
                name = f"{self.name}-{split}.tfrecord-{shard:05d}-of-{self.shards:05d}"
                temporary = self._parts / name
                with temporary.open("wb") as out:
                    for key in keys[start:end]:
                        entry = self._entries[key]
                        part.seek(entry["offset"])
                        out.write(part.read(entry["size"]))
                        payload_bytes += entry["size"] - HEADER_BYTES - FOOTER_BYTES
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(temporary, self.path / name)
        return {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": split,
            "numBytes": str(payload_bytes),
            "shardLengths": [str(b - a) for a, b in itertools.pairwise(bounds)],
        }

    def _encode(self, steps: dict[str, Any], metadata: dict[str, Any]) -> bytes:
        length = _episode_length(steps)
        marks = np.arange(length)
        filled = {"is_first": marks == 0, "is_last": marks == length - 1} | steps
        features: dict[str, Value] = {}
        for key in filled:
            if key in steps and key not in self.spec.steps:
                raise unknown_key(key, self.spec.steps, where="the features under steps/")
        for key, spec in self.spec.steps.items():
            if key not in filled:
                raise ValueError(f"steps/{key}: expected {spec}, got nothing")
            features[f"steps/{key}"] = self._encode_steps(f"steps/{key}", spec, filled[key], length)
        known = self.spec.episode
        named = {k if k in known else f"{METADATA}/{k}": v for k, v in metadata.items()}
        for key in named:
            if key not in self.spec.episode:
                raise unknown_key(key, self.spec.episode, where="the episode features")
        for key, spec in self.spec.episode.items():
            if key not in named:
                raise ValueError(f"{key}: expected {spec}, got nothing")
            value = named[key] if spec.kind == "text" else np.asarray(named[key])[None]
            features[key] = self._encode_steps(key, spec, value, 1)
        return encode_example(features)

    def _encode_steps(self, key: str, spec: FeatureSpec, value: Any, length: int) -> Value:
        if spec.kind == "text":
            texts = [value] * length if isinstance(value, str | bytes) else list(value)
            _expect_length(key, len(texts), length)
            return [t if isinstance(t, bytes) else str(t).encode() for t in texts]
        if spec.kind == "image":
            _expect_length(key, len(value), length)
            return [self._encode_image(key, spec, image) for image in value]
        array = np.asarray(value)
        if array.ndim == 0:
            array = np.broadcast_to(array, (length, *spec.shape))
        expected = (length, *spec.shape)
        if array.shape != expected:
            raise ValueError(f"{key}: expected shape {list(expected)}, got {list(array.shape)}")
        if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            raise ValueError(f"{key}: expected {spec.dtype}, got {array.dtype}")
        array = array.astype(spec.dtype)
        if spec.encoding == "none":
            return array
        rows = [np.ascontiguousarray(row).tobytes() for row in array]
        return [zlib.compress(row) for row in rows] if spec.encoding == "zlib" else rows

    def _encode_image(self, key: str, spec: FeatureSpec, image: Any) -> bytes:
        if isinstance(image, bytes):
            return image
        if image.shape != spec.shape:
            raise ValueError(f"{key}: expected shape {list(spec.shape)}, got {list(image.shape)}")
        return encode_image(image, encoding=spec.encoding or "jpeg", quality=self.image_quality)


def _episode_length(steps: Mapping[str, Any]) -> int:
    for value in steps.values():
        if not isinstance(value, str | bytes) and np.ndim(value) > 0 and len(value):
            return len(value)
    raise ValueError("an episode needs at least one step; got no array or list with an entry")


def _expect_length(key: str, got: int, length: int) -> None:
    if got != length:
        raise ValueError(f"{key}: expected {length} steps as in the other features, got {got}")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= _flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def _open_at(path: Path, end: int) -> Any:
    """`path` open for appending after its first `end` bytes; the rest is dropped."""
    file = path.open("r+b" if path.exists() else "w+b")
    if file.seek(0, os.SEEK_END) < end:
        raise ValueError(f"{path}: expected at least {end} bytes, got {file.tell()}")
    file.truncate(end)
    file.seek(end)
    return file


def _append(file: Any, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)
