"""The index of a LeRobot data set: the same arrays as for RLDS, made from parquet and videos.

Columns of numbers and texts are read once. Pictures that lie in parquet are copied, still encoded,
into a file of the index, because parquet has no random access to one of them: this takes as much
disk as they have, and is logged. Of a video, the file and the first frame of each episode are kept.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from pizero.data.index import (
    Column,
    Contents,
    Index,
    fingerprint,
    homes,
    make_once,
    say_what_changed,
    stamps,
)
from pizero.data.lerobot.cameras import Camera, locate
from pizero.data.lerobot.checksums import verify_checksums
from pizero.data.lerobot.files import find_set, is_snapshot
from pizero.data.lerobot.meta import Meta, read_meta
from pizero.data.lerobot.rows import Layout, check_statistics, column_shape, is_read, why_not
from pizero.data.lerobot.tables import Data, read_data
from pizero.data.lerobot.video import TOLERANCE
from pizero.data.workers import Workers

NAME = "lerobot"  # of an index's folder, before its key
SCHEMA = 1
WORTH_PROCESSES = 2**30  # bytes of a set

log = logging.getLogger(__name__)


def open_index(
    path: str | Path,
    *,
    revision: str | None = None,
    tolerance_s: float = TOLERANCE,
    verify: bool = True,
    on_error: str = "raise",
    num_workers: int | None = None,
) -> Index:
    """The index of a set, made first if there is none for the present files.

    `verify` compares files with SHA256SUMS, where the set has it, and values with the statistics
    recorded of each episode. With `on_error` skip, episodes in damaged data files are left out,
    counted and logged. `num_workers` processes share the files; None: as many as there are CPUs (at
    most 8) for a large set, otherwise none.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"expected on_error raise or skip, got {on_error!r}")
    directory = find_set(path, revision=revision)
    now = stamps(directory, _files(directory))
    key = fingerprint(NAME, SCHEMA, now, tolerance_s, verify, on_error)
    places = homes(directory)
    if is_snapshot(directory):  # nothing is added to the Hub's cache
        places = places[-1:]
    if num_workers is None:
        is_large = sum(size for size, _ in now.values()) > WORTH_PROCESSES
        num_workers = min(8, os.cpu_count() or 1) if is_large else 0
    make = partial(_make, directory, now, tolerance_s, verify, on_error, num_workers)
    return Index(make_once(places, f"{NAME}-{key}", make), directory)


def _files(directory: Path) -> Iterator[Path]:
    """All files of a set, sorted; not those in hidden folders, nor pictures of a recording."""
    for folder, folders, names in os.walk(directory, followlinks=True):
        depth = len(Path(folder).relative_to(directory).parts)
        folders[:] = [n for n in sorted(folders) if depth < 6 and n[0] != "." and n != "images"]
        yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def _make(
    directory: Path,
    now: dict[str, list[int]],
    tolerance_s: float,
    verify: bool,
    on_error: str,
    num_workers: int,
    folder: Path,
) -> None:
    say_what_changed([folder.parent], NAME, now)
    with Workers(num_workers) as workers:
        if verify:
            verify_checksums(directory, now, workers)
        meta = read_meta(directory)
        layout = Layout(directory, meta.fps, meta.features, meta.texts, tolerance_s, verify)
        data = read_data(meta, layout, folder=folder, on_error=on_error, workers=workers)
        if verify:
            _check_whole(meta, data)
        cameras = {
            key: locate(meta, key, workers)
            for key in meta.videos
            if not meta.features[key].is_depth
        }
    for line in data.damaged[:20]:
        log.warning("left out: %s", line)
    _contents(meta, data, cameras, now).write(folder)


def _check_whole(meta: Meta, data: Data) -> None:
    """Version 2.0 has statistics of the whole set only."""
    for key, recorded in meta.whole_statistics.items():
        column, feature = f"steps.{key}", meta.features.get(key)
        if feature and feature.kind == "tensor" and column in data.tables and not data.damaged:
            values = data.tables[column]
            name = f"{meta.directory}, {key} of all episodes"
            check_statistics(values, np.array([len(values)]), recorded, names=[name])


def _contents(
    meta: Meta, data: Data, cameras: dict[str, Camera], now: dict[str, list[int]]
) -> Contents:
    left = data.episodes
    columns: dict[str, Column] = {}
    tables = {**data.tables, **data.texts}
    absent = {}
    for key, feature in meta.features.items():
        if is_read(feature):
            is_tensor = feature.kind == "tensor"
            shape = column_shape(feature) if is_tensor else ()
            columns[f"steps.{key}"] = Column(
                feature.kind, feature.dtype if is_tensor else "", shape
            )
        elif key not in cameras:
            absent[f"steps.{key}"] = why_not(feature)
    columns |= {column: Column("text") for column in data.texts}
    files = list(data.files)
    for key, camera in cameras.items():
        columns[f"steps.{key}"] = Column("video")
        table = camera.table[left]
        tables[f"steps.{key}"] = np.where(table < 0, -1, table + np.array([len(files), 0]))
        files += camera.files
    first = {"task": [tasks[0] if tasks else "" for tasks in meta.tasks]}
    numbers = {"episode_index": meta.numbers, "length": meta.lengths}
    for key, values in {**first, **numbers, **meta.extra}.items():
        chosen = [values[i] for i in left.tolist()]
        if isinstance(chosen[0], str):
            columns[f"episode.{key}"] = Column("text")
            tables[f"episode.{key}"] = data.strings(chosen)
        else:
            array = tables[f"episode.{key}"] = np.array(chosen)
            columns[f"episode.{key}"] = Column("tensor", str(array.dtype))
    lengths = meta.lengths[left]
    tables["episodes"] = np.stack([np.cumsum(lengths) - lengths, lengths, data.file], axis=1)
    return Contents(
        files=files,
        columns=columns,
        tables=tables,
        strings=list(data.strings.numbers),
        stamps=now,
        absent=absent,
        damaged=data.damaged,
        facts={
            "version": meta.version,
            "fps": meta.fps,
            "splits": {
                name: np.searchsorted(left, [start, end]).tolist()
                for name, (start, end) in meta.splits.items()
            },
            "gop": {key: camera.gop for key, camera in cameras.items()},
            "problems": {key: c.problems for key, c in cameras.items() if c.problems},
        },
    )
