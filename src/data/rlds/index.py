"""The index of an RLDS split: where every image lies, and all low-dimensional values as arrays.

Built once by walking the shards without touching image bytes, then memory mapped by every process:

    <dataset>/.pizero_index/<split>-<key>/manifest.json   spec, files, string table
                                          steps.<key>.npy     one row per step (image: offset, size)
                                          episode.<key>.npy   one row per episode
                                          episodes.npy        start, length, shard of each episode

The key covers the schema, `features.json` and the name, size and time of each shard, so changed
data gets a new index. Where the dataset cannot be written, the index goes to the user's cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data.rlds.example import Feature, parse_example
from pizero.data.rlds.spec import STEPS, DatasetSpec, FeatureSpec, unknown_key
from pizero.data.rlds.tfrecord import CorruptRecordError, scan_records

SCHEMA = 1
LARGEST_ROW = 64  # numbers; longer vectors (language embeddings) are left in the files

Tables = dict[str, np.ndarray]


class Index:
    """An opened index. Arrays are mapped on first use and dropped when pickled.

    `starts` and `lengths` [episodes] are rows of the step tables; `files` are the shards, `shard`
    [episodes] says which one holds an episode.
    """

    def __init__(self, folder: Path, directory: Path) -> None:
        self.folder, self.directory = folder, directory
        self._columns: dict[tuple[str, str, str], np.ndarray] = {}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the index was built from."""
        return json.loads((self.folder / "manifest.json").read_text())

    @cached_property
    def files(self) -> list[str]:
        """Absolute paths of the shards."""
        return [str(self.directory / name) for name in self.manifest["files"]]

    @cached_property
    def strings(self) -> list[str]:
        """The distinct texts; text columns hold numbers into this list."""
        return self.manifest["strings"]

    @cached_property
    def spec(self) -> DatasetSpec:
        """The features of the dataset."""
        return DatasetSpec.load(self.directory / "features.json")

    @cached_property
    def _episodes(self) -> np.ndarray:
        return self._load("episodes")

    @property
    def starts(self) -> np.ndarray:
        """First row of each episode in the step tables."""
        return self._episodes[:, 0]

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode."""
        return self._episodes[:, 1]

    @property
    def shard(self) -> np.ndarray:
        """The file that holds each episode, as a position in `files`."""
        return self._episodes[:, 2]

    def step_values(self, key: str, kind: str = "any") -> np.ndarray:
        """The column of a key below `steps/`, which must be of the kind.

        tensor [steps ...], text numbers [steps], or the offset and size of each image [steps 2].
        """
        return self._column("steps", key, kind)

    def episode_values(self, key: str) -> np.ndarray:
        """The column of a key outside the steps, e.g. `episode_metadata/task`."""
        return self._column("episode", key, "any")

    def texts(self, numbers: np.ndarray) -> list[str]:
        """The strings that a text column stands for."""
        return [self.strings[n] for n in numbers]

    def _column(self, group: str, key: str, kind: str) -> np.ndarray:
        column = self._columns.get((group, key, kind))
        if column is None:
            self._check(group, key, kind)
            column = self._columns[group, key, kind] = self._load(f"{group}.{key}")
        return column

    def _check(self, group: str, key: str, kind: str) -> None:
        specs = self.spec.steps if group == "steps" else self.spec.episode
        where = f"{self.directory} ({group})"
        stored = {k: s for k, s in specs.items() if f"{group}.{k}" in self.manifest["columns"]}
        if key in specs and key not in stored:
            raise ValueError(
                f"{where}: {key!r} is not in the index: {specs[key]}; only images, text and "
                f"fixed arrays of at most {LARGEST_ROW} numbers are"
            )
        if key not in stored or kind not in ("any", stored[key].kind):
            choices = [k for k, s in stored.items() if kind in ("any", s.kind)]
            raise unknown_key(key, choices, where=f"{where}, {kind} features,")

    def _load(self, column: str) -> np.ndarray:
        mapped = np.load(self.folder / _file_name(column), mmap_mode="r")
        return mapped.view(np.ndarray)  # still mapped, without the cost of the memmap class

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self.folder, "directory": self.directory}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(**state)


def find_dataset(path: str | Path) -> Path:
    """The folder with `features.json`: `path` itself, or the only one at most two levels below."""
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"no dataset at {path}: the folder does not exist")
    found = [
        p.parent for depth in ("", "*/", "*/*/") for p in sorted(path.glob(depth + "features.json"))
    ]
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(path)) for p in found) or "none"
        raise ValueError(f"expected one folder with features.json in {path}, found: {names}")
    return found[0].resolve()


def open_index(
    path: str | Path, split: str, *, num_workers: int = 0, check_payload: bool = False
) -> Index:
    """The index of a split, built first if there is none for the present files.

    `num_workers` processes share the shards of a large dataset. One process builds, the others wait
    for it. `check_payload` verifies every byte against its checksum while building.
    """
    directory = find_dataset(path)
    files = _shards(directory, split)
    key = _fingerprint(directory, files)
    homes = _homes(directory)
    for home in homes:
        if (home / f"{split}-{key}" / "manifest.json").exists():
            return Index(home / f"{split}-{key}", directory)
    for home in homes:
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock = (home / f"{split}.lock").open("w")
        except OSError:  # a read-only dataset; the user's cache comes next
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder = home / f"{split}-{key}"
            if not (folder / "manifest.json").exists():
                _build(directory, files, folder, num_workers, check_payload)
            return Index(folder, directory)
    raise ValueError(
        f"nowhere to write the index of {directory}; tried {', '.join(map(str, homes))}"
    )


def _homes(directory: Path) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{directory.parent.name}-{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"
    beside = directory / ".pizero_index"
    # A folder without any write bit is meant to stay as it is, even for root.
    is_read_only = not directory.stat().st_mode & 0o222 and not beside.exists()
    return [*([] if is_read_only else [beside]), cache / "pizero" / "index" / name]


def _shards(directory: Path, split: str) -> list[Path]:
    pattern = re.compile(r".+-(?P<split>[^-]+)\.tfrecord(-(?P<i>\d+)-of-(?P<n>\d+))?$")
    matches = [(p, m) for p in sorted(directory.iterdir()) if (m := pattern.match(p.name))]
    files = [(p, m) for p, m in matches if m["split"] == split]
    if not files:
        splits = {m["split"] for _, m in matches}
        raise unknown_key(split, splits, where=f"{directory}, splits,")
    expected = int(files[0][1]["n"] or 1)
    if len(files) != expected:
        raise ValueError(f"{directory}: expected {expected} shards of {split!r}, got {len(files)}")
    return [p for p, _ in files]


def _fingerprint(directory: Path, files: list[Path]) -> str:
    digest = hashlib.sha256(f"schema {SCHEMA}".encode())
    digest.update((directory / "features.json").read_bytes())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _build(
    directory: Path, files: list[Path], folder: Path, num_workers: int, check_payload: bool
) -> None:
    jobs = [(directory, file, i, check_payload) for i, file in enumerate(files)]
    if num_workers:
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            shards = list(pool.map(_index_shard, jobs))
    else:
        shards = [_index_shard(job) for job in jobs]
    strings: dict[str, int] = {}
    for tables, texts in shards:  # number the texts of all shards together
        numbers = np.array([strings.setdefault(t, len(strings)) for t in texts], np.int32)
        for column in tables.pop("text columns").tolist():
            tables[column] = numbers[tables[column]]
    first = np.cumsum([0] + [int(t["episodes"][:, 1].sum()) for t, _ in shards])
    for (tables, _), offset in zip(shards, first, strict=False):
        tables["episodes"][:, 0] += offset
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        columns = list(shards[0][0])
        for column in columns:
            merged = np.concatenate([tables[column] for tables, _ in shards])
            np.save(temporary / _file_name(column), merged)
        manifest = {
            "files": [f.name for f in files],
            "columns": columns,
            "strings": list(strings),
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        os.chmod(temporary, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _index_shard(job: tuple[Path, Path, int, bool]) -> tuple[Tables, list[str]]:
    directory, file, number, check_payload = job
    spec = DatasetSpec.load(directory / "features.json")
    columns = {f"steps.{k}": (STEPS + k, s) for k, s in spec.steps.items() if _is_kept(s)}
    columns |= {f"episode.{k}": (k, s) for k, s in spec.episode.items() if _is_kept(s)}
    rows: dict[str, list[np.ndarray]] = {column: [] for column in columns}
    episodes: list[tuple[int, int, int]] = []
    strings: dict[str, int] = {}
    start = 0
    with file.open("rb") as handle:
        buffer = _map_file(handle.fileno(), sequential=check_payload)
        for offset, length in scan_records(buffer, name=str(file), check_payload=check_payload):
            try:
                features = parse_example(buffer[offset : offset + length])
                steps = _num_steps(features, spec)
                for column, (key, leaf) in columns.items():
                    count = steps if key.startswith(STEPS) else 1
                    rows[column].append(_column(features.get(key), leaf, count, offset, strings))
            except ValueError as error:
                raise CorruptRecordError(f"{file}, record at offset {offset}: {error}") from error
            episodes.append((start, steps, number))
            start += steps
    tables = {c: _stack(rows[c], columns[c][1]) for c in columns}
    tables["episodes"] = np.array(episodes, np.int64).reshape(-1, 3)
    tables["text columns"] = np.array([c for c in columns if columns[c][1].kind == "text"], object)
    return tables, list(strings)


def _map_file(descriptor: int, *, sequential: bool) -> memoryview:
    if not os.fstat(descriptor).st_size:
        return memoryview(b"")
    view = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM") and not sequential:
        view.madvise(mmap.MADV_RANDOM)  # only headers are touched; do not read images ahead
    return memoryview(view)


def _num_steps(features: Mapping[str, Feature], spec: DatasetSpec) -> int:
    for key in ("is_first", "is_last", *spec.steps):
        leaf = spec.steps.get(key)
        feature = features.get(STEPS + key)
        if feature is None or leaf is None or leaf.kind == "ragged" or -1 in leaf.shape:
            continue
        if feature.kind == "bytes":
            return len(feature.spans())
        values = feature.floats() if feature.kind == "float" else feature.ints()
        if leaf.size and len(values):
            return len(values) // leaf.size
    raise ValueError("expected at least one value under steps/, got none")


def _column(
    feature: Feature | None, spec: FeatureSpec, steps: int, offset: int, strings: dict[str, int]
) -> np.ndarray:
    """The rows one episode adds to a column; an absent optional feature gives empty values."""
    if spec.kind == "image":
        spans = feature.spans() if feature else np.zeros((steps, 2), np.int64)
        _expect_steps(len(spans), steps)
        return spans + np.array([offset, 0])
    if spec.kind == "text":
        texts = [s.decode() for s in feature.strings()] if feature else [""] * steps
        _expect_steps(len(texts), steps)
        return np.array([strings.setdefault(t, len(strings)) for t in texts], np.int32)
    if feature is None:
        return np.zeros((steps, *spec.shape), spec.dtype)
    if spec.encoding != "none":
        unpack = zlib.decompress if spec.encoding == "zlib" else bytes
        values = np.frombuffer(b"".join(map(unpack, feature.strings())), spec.dtype)
    elif feature.kind == "float":
        values = feature.floats()
    else:
        values = feature.ints()
    if len(values) != steps * spec.size:
        raise ValueError(f"expected {steps} steps of {spec.shape}, got {len(values)} numbers")
    return values.reshape(steps, *spec.shape).astype(spec.dtype)


def _expect_steps(got: int, steps: int) -> None:
    if got != steps:
        raise ValueError(f"expected {steps} steps as in the other features, got {got}")


def _stack(rows: list[np.ndarray], spec: FeatureSpec) -> np.ndarray:
    if rows:
        return np.concatenate(rows)
    if spec.kind == "tensor":
        return np.zeros((0, *spec.shape), spec.dtype)
    return np.zeros((0, 2), np.int64) if spec.kind == "image" else np.zeros(0, np.int32)


def _is_kept(spec: FeatureSpec) -> bool:
    if spec.kind == "tensor":
        known = spec.dtype not in ("string", "object", "bfloat16")
        return known and -1 not in spec.shape and spec.size <= LARGEST_ROW
    return spec.kind in ("image", "text")


def _file_name(column: str) -> str:
    return column.replace("/", "__") + ".npy"
