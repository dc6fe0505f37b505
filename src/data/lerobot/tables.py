"""All data files of a set as one table of each column, read in this process or in several."""

from __future__ import annotations

import itertools
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pizero.data.index import OWN, Tables
from pizero.data.lerobot.files import open_parquet, parquet_errors
from pizero.data.lerobot.meta import Meta
from pizero.data.lerobot.rows import Layout, Part, Rows, Strings, is_read, read_part
from pizero.data.workers import Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """What the data files hold, one after the other."""

    tables: Tables  # steps.<key>
    texts: Tables  # steps.<key>, numbers of `strings`
    strings: Strings
    episodes: np.ndarray  # positions, in the set, of the episodes that could be read
    files: list[str]  # from which images are read, and
    file: np.ndarray  # which of them is an episode's, int64 [episodes]
    damaged: list[str]


def read_data(
    meta: Meta,
    layout: Layout,
    *,
    folder: Path,
    on_error: str,
    workers: Workers,
) -> Data:
    """Read and check every data file; pictures are copied into files in `folder`.

    ValueError for the first file that is not as the set says; with `on_error` skip its episodes are
    left out and `damaged` has a line about it.
    """
    groups = _grouped(meta, max(1, 4 * workers.count))
    has_images = any(f.kind == "image" and is_read(f) for f in meta.features.values())
    if has_images:
        _say_size_of_images(meta, folder)
    blobs = [f"images-{i:03d}.bin" for i in range(len(groups))] if has_images else []
    jobs = [
        _Job(layout, parts, folder / blobs[i] if has_images else None, on_error)
        for i, parts in enumerate(groups)
    ]
    what = f"indexing {meta.directory.name}, {len(meta.data.files)} data files"
    shards = list(workers(_read_group, jobs, what=what))
    damaged = [line for shard in shards for line in shard.damaged]
    episodes = np.concatenate([shard.episodes for shard in shards])
    if not len(episodes):
        raise ValueError(f"{meta.directory}: no data file can be read; the first: {damaged[0]}")
    strings = Strings()
    for shard in shards:
        own = strings(list(shard.strings.numbers))
        shard.rows.texts = {c: own[numbers] for c, numbers in shard.rows.texts.items()}
    rows = _joined([shard.rows for shard in shards if len(shard.episodes)], strings)
    if has_images:
        files = [OWN + blob for blob in blobs]
        file = np.repeat(np.arange(len(shards)), [len(shard.episodes) for shard in shards])
    else:
        files, file = meta.data.files, meta.data.file[episodes]
    return Data(rows.tables, rows.texts, strings, episodes, files, file, damaged)


@dataclass(frozen=True)
class _Job:
    layout: Layout
    parts: list[tuple[np.ndarray, Part]]  # positions of the episodes in the set, and their file
    images: Path | None
    on_error: str


@dataclass(frozen=True)
class _Shard:
    rows: Rows
    strings: Strings
    episodes: np.ndarray
    damaged: list[str]


def _grouped(meta: Meta, most: int) -> list[list[tuple[np.ndarray, Part]]]:
    """The data files in at most so many groups, in the order of their episodes."""
    if (np.diff(meta.data.file) < 0).any():
        raise ValueError(
            f"{meta.directory}/meta/episodes: expected the episodes of each data file to follow "
            "one another"
        )
    bounds = np.searchsorted(meta.data.file, np.arange(len(meta.data.files) + 1)).tolist()
    parts = []
    for name, start, end in zip(meta.data.files, bounds, bounds[1:], strict=False):
        at = slice(start, end)
        statistics = {
            key: {statistic: values[at] for statistic, values in found.items()}
            for key, found in meta.statistics.items()
        }
        first = None if meta.first_rows is None else meta.first_rows[at]
        part = Part(name, meta.numbers[at], meta.lengths[at], meta.tasks[at], first, statistics)
        parts.append((np.arange(start, end), part))
    edges = np.linspace(0, len(parts), min(most, len(parts)) + 1).astype(int).tolist()
    return [parts[a:b] for a, b in itertools.pairwise(edges)]


def _read_group(job: _Job) -> _Shard:
    strings = Strings()
    rows: list[Rows] = []
    episodes, damaged = [np.zeros(0, np.int64)], []
    images = job.images.open("wb") if job.images else None
    try:
        for at, part in job.parts:
            try:
                rows.append(read_part(job.layout, part, strings, images))
                episodes.append(at)
            except ValueError as error:
                if job.on_error == "raise":
                    raise
                damaged.append(f"{len(at)} episodes: {error}")
    finally:
        if images is not None:
            images.close()
    return _Shard(_joined(rows, strings), strings, np.concatenate(episodes), damaged)


def _joined(pieces: list[Rows], strings: Strings) -> Rows:
    """One after the other; texts that some have none of are empty there. Empties the pieces."""
    tables: Tables = {}
    for column in list(pieces[0].tables) if pieces else ():
        tables[column] = np.concatenate([piece.tables.pop(column) for piece in pieces])
    texts: Tables = {}
    for column in dict.fromkeys(column for piece in pieces for column in piece.texts):
        found = [
            piece.texts[column]
            if column in piece.texts
            else np.repeat(strings([""]), len(piece.texts["steps.task"]))
            for piece in pieces
        ]
        texts[column] = np.concatenate(found)
    return Rows(tables, texts)


def _say_size_of_images(meta: Meta, folder: Path) -> None:
    """Log how much disk the copies of pictures will take; ValueError if there is not as much."""
    keys = [key for key, f in meta.features.items() if f.kind == "image" and is_read(f)]
    size = 0
    for name in meta.data.files:
        path = meta.directory / name
        try:
            with parquet_errors(path):
                file = open_parquet(path).metadata
                for group in range(file.num_row_groups):
                    for column in map(file.row_group(group).column, range(file.num_columns)):
                        if column.path_in_schema.rpartition(".")[0] in keys:
                            size += column.total_uncompressed_size
        except ValueError:
            continue  # reading it will tell
    free = shutil.disk_usage(folder).free
    log.info(
        "copying the pictures of %s in %s out of parquet takes %.3g MB of disk in %s",
        *(", ".join(keys), meta.directory, size / 1e6, folder.parent),
    )
    if size > free:
        raise ValueError(
            f"{folder.parent}: expected {size / 1e9:.3g} GB of free disk for the pictures of "
            f"{meta.directory}, got {free / 1e9:.3g} GB"
        )
