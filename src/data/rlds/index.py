"""The index of a split of TFRecords: where every image lies, and all other values as arrays.

Every shard is walked once. Its checksums are verified on the way, so damage is found here and not
in the middle of a training run; without that (`verify` False) only headers are touched, which a
remote file system may need.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from pizero.data.checksum import crc32c
from pizero.data.files import read_json
from pizero.data.index import (
    Column,
    Contents,
    Index,
    Tables,
    fingerprint,
    homes,
    make_once,
    say_what_changed,
    stamps,
    unknown_key,
)
from pizero.data.rlds.example import Feature, parse_example
from pizero.data.rlds.spec import STEPS, DatasetSpec, FeatureSpec
from pizero.data.rlds.tfrecord import CorruptRecordError, scan_records, verify_record
from pizero.data.workers import Workers

LARGEST_ROW = 64  # numbers; longer vectors (language embeddings) are left in the files
WORTH_PROCESSES = 2**30  # bytes of a split
DESCRIPTIONS = ("features.json", "dataset_info.json")
RAGGED = ("ragged_flat_values", "ragged_row_lengths_0")

log = logging.getLogger(__name__)


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


def splits(directory: Path) -> list[str]:
    """The splits that a data set has files of."""
    return sorted({match["split"] for _, match in _records(directory)})


def open_index(
    path: str | Path,
    split: str,
    *,
    num_workers: int | None = None,
    verify: bool = True,
    on_error: str = "raise",
) -> Index:
    """The index of a split, made first if there is none for the present files.

    `num_workers` processes share the shards; None: as many as there are CPUs (at most 8) for a
    large data set, otherwise none. `verify` compares every byte with its checksum. With `on_error`
    skip, damaged records are left out, counted and logged; otherwise CorruptRecordError tells file
    and offset.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"expected on_error raise or skip, got {on_error!r}")
    directory = find_dataset(path)
    files = _shards(directory, split)
    described = [directory / name for name in DESCRIPTIONS if (directory / name).is_file()]
    now = stamps(directory, [*files, *described])
    key = fingerprint(now, verify, on_error)
    places = homes(directory)
    make = partial(_make, directory, split, files, now, num_workers, verify, on_error)
    return Index(make_once(places, f"{split}-{key}", make), directory)


def _records(directory: Path) -> list[tuple[Path, re.Match[str]]]:
    pattern = re.compile(r".+-(?P<split>[^-]+)\.tfrecord(-(?P<i>\d+)-of-(?P<n>\d+))?$")
    return [(p, m) for p in sorted(directory.iterdir()) if (m := pattern.match(p.name))]


def _shards(directory: Path, split: str) -> list[Path]:
    files = [(p, m) for p, m in _records(directory) if m["split"] == split]
    if not files:
        raise unknown_key(split, splits(directory), where=f"{directory}, splits,")
    expected = int(files[0][1]["n"] or 1)
    if len(files) != expected:
        raise ValueError(f"{directory}: expected {expected} shards of {split!r}, got {len(files)}")
    return [p for p, _ in files]


def _make(
    directory: Path,
    split: str,
    files: list[Path],
    now: dict[str, list[int]],
    num_workers: int | None,
    verify: bool,
    on_error: str,
    folder: Path,
) -> None:
    say_what_changed([folder.parent], split, now)
    spec = DatasetSpec.load(directory / "features.json")
    jobs = [_Job(file, i, spec, verify, on_error) for i, file in enumerate(files)]
    total = sum(now[file.name][0] for file in files)
    if num_workers is None:
        fitting = min(8, os.cpu_count() or 1, len(files))
        num_workers = fitting if total > WORTH_PROCESSES and fitting > 1 else 0
    what = f"indexing {split} of {directory.name}, {len(files)} files, {total / 1e9:.3g} GB"
    with Workers(num_workers) as workers:
        shards = list(workers(_index_shard, jobs, what=what))
    damaged = [line for shard in shards for line in shard.damaged]
    for line in damaged[:20]:
        log.warning("left out: %s", line)
    if damaged:
        log.warning("%d damaged records of %s are left out", len(damaged), directory)
    else:
        _compare_counts(directory, split, files, [len(s.tables["episodes"]) for s in shards])
    Contents(
        files=[f.name for f in files],
        columns=_columns(spec),
        tables=_merged(shards),
        strings=list(_numbered(shards)),
        stamps=now,
        absent={
            f"{group}.{key}": f"{leaf.kind} {leaf.dtype} {list(leaf.shape)}; only images, "
            f"texts and arrays of at most {LARGEST_ROW} numbers are"
            for group, leaves in (("steps", spec.steps), ("episode", spec.episode))
            for key, leaf in leaves.items()
            if not _is_kept(leaf)
        },
        damaged=damaged,
    ).write(folder)


def _compare_counts(directory: Path, split: str, files: list[Path], got: list[int]) -> None:
    """What dataset_info.json says of each shard, if it says anything."""
    path = directory / DESCRIPTIONS[1]
    if not path.is_file():
        return
    try:
        listed = {s["name"]: s.get("shardLengths", []) for s in read_json(path)["splits"]}
        expected = [int(n) for n in listed.get(split, [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected splits with shardLengths, got {type(error).__name__}: {error}"
        ) from error
    if expected and expected != got:
        wrong = [
            f"{f.name}: {e} and {g}"
            for f, e, g in zip(files, expected, got, strict=False)
            if e != g
        ]
        raise ValueError(
            f"{directory}: dataset_info.json and the files of {split!r} disagree on the number of "
            f"episodes ({len(expected)} and {len(got)} files; {', '.join(wrong[:5])}). Copy the "
            "data again, or remove dataset_info.json if the files are right"
        )


@dataclass(frozen=True)
class _Job:
    file: Path
    number: int
    spec: DatasetSpec
    verify: bool
    on_error: str


@dataclass
class _Shard:
    tables: Tables
    strings: list[str]
    text_columns: list[str]
    damaged: list[str] = field(default_factory=list)


def _columns(spec: DatasetSpec) -> dict[str, Column]:
    groups = (("steps", spec.steps), ("episode", spec.episode))
    return {
        f"{group}.{key}": Column(leaf.kind, leaf.dtype, leaf.shape)
        for group, leaves in groups
        for key, leaf in leaves.items()
        if _is_kept(leaf)
    }


def _index_shard(job: _Job) -> _Shard:
    spec = job.spec
    columns = {f"steps.{k}": (STEPS + k, s) for k, s in spec.steps.items() if _is_kept(s)}
    columns |= {f"episode.{k}": (k, s) for k, s in spec.episode.items() if _is_kept(s)}
    rows: dict[str, list[np.ndarray]] = {column: [] for column in columns}
    ends: dict[str, list[np.ndarray]] = {
        c: [] for c, (_, s) in columns.items() if s.kind == "ragged"
    }
    images = [c for c, (_, s) in columns.items() if s.kind == "image" and job.verify]
    crcs: dict[str, list[np.ndarray]] = {c: [] for c in images}
    episodes: list[tuple[int, int, int]] = []
    strings: dict[str, int] = {}
    damaged: list[str] = []
    start = 0
    with job.file.open("rb") as handle:
        buffer = _map_file(handle.fileno(), sequential=job.verify)
        records = scan_records(buffer, name=str(job.file))
        while True:
            offset = -1
            try:
                offset, length = next(records, (-1, -1))
                if offset < 0:
                    break
                if job.verify:
                    verify_record(buffer, offset, length, name=str(job.file))
                features = parse_example(buffer[offset : offset + length])
                steps = _num_steps(features, spec)
                found = {
                    column: _column(features, key, leaf, steps, offset, strings)
                    for column, (key, leaf) in columns.items()
                }
            except (ValueError, zlib.error) as error:
                if not isinstance(error, CorruptRecordError):
                    error = CorruptRecordError(f"{job.file}, record at offset {offset}: {error}")
                if job.on_error == "raise":
                    raise error from None
                damaged.append(str(error))
                continue  # a broken header ends the generator, and with it the shard
            for column, (values, lengths) in found.items():
                rows[column].append(values)
                if job.verify and columns[column][1].kind == "image":
                    crcs[column].append(_crcs(buffer, values))
                if lengths is not None:
                    ends[column].append(lengths)
            episodes.append((start, steps, job.number))
            start += steps
    tables = {c: _stack(rows[c], columns[c][1]) for c in columns}
    for column, lengths in ends.items():
        tables[f"{column}.ends"] = np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))
    for column, values in crcs.items():
        tables[f"{column}.crc"] = np.concatenate([np.zeros(0, np.uint32), *values])
    tables["episodes"] = np.array(episodes, np.int64).reshape(-1, 3)
    texts = [c for c, (_, leaf) in columns.items() if _is_text(leaf)]
    return _Shard(tables, list(strings), texts, damaged)


def _numbered(shards: list[_Shard]) -> dict[str, int]:
    """One number for each text of all shards."""
    strings: dict[str, int] = {}
    for shard in shards:
        for text in shard.strings:
            strings.setdefault(text, len(strings))
    return strings


def _merged(shards: list[_Shard]) -> Tables:
    """The tables of all shards one after the other; shards are emptied on the way."""
    numbers = _numbered(shards)
    rows = 0
    added = dict.fromkeys((c for c in shards[0].tables if c.endswith(".ends")), 0)
    for shard in shards:
        own = np.array([numbers[t] for t in shard.strings], np.int32)
        for column in shard.text_columns:
            shard.tables[column] = own[shard.tables[column]]
        for column in added:
            ends = shard.tables[column]
            shard.tables[column] = ends + added[column]
            added[column] += int(ends[-1]) if len(ends) else 0
        shard.tables["episodes"][:, 0] += rows
        rows += int(shard.tables["episodes"][:, 1].sum())
    columns = list(shards[0].tables)
    return {c: np.concatenate([shard.tables.pop(c) for shard in shards]) for c in columns}


def _map_file(descriptor: int, *, sequential: bool) -> memoryview:
    if not os.fstat(descriptor).st_size:
        return memoryview(b"")
    view = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        # Only headers are touched without verifying; images should not be read ahead then.
        view.madvise(mmap.MADV_SEQUENTIAL if sequential else mmap.MADV_RANDOM)
    return memoryview(view)


def _crcs(buffer: memoryview, spans: np.ndarray) -> np.ndarray:
    """The checksum of each image, uint32 [n]."""
    found = [crc32c(buffer[offset : offset + size]) for offset, size in spans.tolist()]
    return np.array(found, np.uint32)


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
    features: Mapping[str, Feature],
    key: str,
    spec: FeatureSpec,
    steps: int,
    offset: int,
    strings: dict[str, int],
) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows one episode adds to a column; an absent optional feature gives empty values.

    Of ragged ones, all values and how many of them each step has.
    """
    rows = steps if key.startswith(STEPS) else 1
    try:
        if spec.kind == "ragged":
            return _ragged(features, key, spec, rows, strings)
        return _fixed(features.get(key), spec, rows, offset, strings), None
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{key}: {error}") from error


def _ragged(
    features: Mapping[str, Feature],
    key: str,
    spec: FeatureSpec,
    rows: int,
    strings: dict[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    flat, counts = (features.get(f"{key}/{part}") for part in RAGGED)
    if counts is None:  # one list for the whole episode
        flat = features.get(key, flat)
        values = _values(flat, spec, strings)
        _expect(rows == 1 or not len(values), f"row lengths for {rows} steps", "none")
        return values, np.full(rows, len(values) if rows == 1 else 0, np.int64)
    values, lengths = _values(flat, spec, strings), counts.ints()
    _expect(len(lengths) == rows, f"{rows} row lengths", len(lengths))
    _expect(
        lengths.min(initial=0) >= 0 and lengths.sum() == len(values),
        "lengths that add up",
        lengths.sum(),
    )
    return values, lengths


def _fixed(
    feature: Feature | None, spec: FeatureSpec, rows: int, offset: int, strings: dict[str, int]
) -> np.ndarray:
    if spec.kind == "image":
        spans = feature.spans() if feature else np.zeros((rows, 2), np.int64)
        _expect(len(spans) == rows, f"{rows} images as there are steps", len(spans))
        return spans + np.array([offset, 0])
    if feature is None and spec.kind == "text":
        return np.full(rows, strings.setdefault("", len(strings)), np.int32)
    if feature is None:
        return np.full((rows, *spec.shape), spec.absent, spec.dtype)
    values = _values(feature, spec, strings)
    if spec.kind == "text":
        _expect(len(values) == rows, f"{rows} texts as there are steps", len(values))
        return values
    _expect(len(values) == rows, f"{rows} steps of {list(spec.shape)}", f"{len(values)} such")
    return values


def _values(feature: Feature | None, spec: FeatureSpec, strings: dict[str, int]) -> np.ndarray:
    """All values of a list, [n *shape]; of texts their numbers."""
    if spec.codes:  # a text as numbers, one per character, filled up with zeros
        codes = np.zeros((0, spec.codes), np.int64)
        if feature is not None:
            codes = feature.ints().reshape(-1, spec.codes)
        texts = ["".join(map(chr, row[: _length(row)].tolist())) for row in codes]
        return np.array([strings.setdefault(t, len(strings)) for t in texts], np.int32)
    if _is_text(spec):
        texts = [s.decode() for s in feature.strings()] if feature else []
        return np.array([strings.setdefault(t, len(strings)) for t in texts], np.int32)
    if feature is None:
        flat = np.zeros(0, spec.dtype)
    elif spec.encoding != "none":
        unpack = zlib.decompress if spec.encoding == "zlib" else bytes
        flat = np.frombuffer(b"".join(map(unpack, feature.strings())), spec.dtype)
    else:
        flat = feature.floats() if feature.kind == "float" else feature.ints()
    _expect(
        len(flat) % max(spec.size, 1) == 0, f"rows of {list(spec.shape)}", f"{len(flat)} numbers"
    )
    rows = len(flat) // spec.size if spec.size else 0
    return flat.reshape(rows, *spec.shape).astype(spec.dtype)


def _length(codes: np.ndarray) -> int:
    zeros = np.flatnonzero(codes == 0)
    return int(zeros[0]) if len(zeros) else len(codes)


def _expect(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"expected {expected}, got {got}")


def _stack(rows: list[np.ndarray], spec: FeatureSpec) -> np.ndarray:
    if rows:
        return np.concatenate(rows)
    if spec.kind == "image":
        return np.zeros((0, 2), np.int64)
    if _is_text(spec):
        return np.zeros(0, np.int32)
    return np.zeros((0, *spec.shape), spec.dtype)


def _is_text(spec: FeatureSpec) -> bool:
    return spec.kind == "text" or (spec.kind == "ragged" and spec.dtype == "string")


def _is_kept(spec: FeatureSpec) -> bool:
    if spec.kind in ("image", "text"):
        return True
    if spec.kind == "ragged" and spec.dtype == "string":
        return not spec.shape
    known = spec.dtype not in ("", "string", "object", "bfloat16")
    return known and -1 not in spec.shape and spec.size <= LARGEST_ROW
