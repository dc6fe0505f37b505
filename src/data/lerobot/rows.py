"""The rows of one data file as arrays, after checking that they are what the set says of them.

Every disagreement is a ValueError with the file, the row or episode, and both values: LeRobot's
files carry no checksums, so agreement of what is said twice is what shows that they are whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pizero.data.checksum import crc32c
from pizero.data.index import Tables, unknown_key
from pizero.data.lerobot.files import open_parquet, parquet_errors
from pizero.data.lerobot.meta import STATISTICS, Feature

LARGEST_ROW = 64  # numbers; longer vectors are left in the files
OWN_CHECKS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
IMAGE_ROWS = 256  # read at a time
LANGUAGE = "language_persistent"  # annotations that hold from some time on, e.g. of subtasks

Recorded = Mapping[str, Mapping[str, np.ndarray]]  # feature -> min, max, ... [episodes d]


@dataclass(frozen=True)
class Part:
    """The episodes that lie in one data file, and what is said of them."""

    file: str
    numbers: np.ndarray  # int64 [episodes]
    lengths: np.ndarray
    tasks: list[list[str]]
    first_rows: np.ndarray | None  # in the whole set
    statistics: Recorded


@dataclass(frozen=True)
class Layout:
    """What holds for all data files of a set."""

    directory: Path
    fps: float
    features: Mapping[str, Feature]
    texts: Mapping[int, str]
    tolerance_s: float
    verify: bool  # compare the recorded statistics


class Strings:
    """Texts as numbers, in the order of their first coming."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [n]."""
        numbers = self.numbers
        return np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int32)


@dataclass
class Rows:
    """The columns `steps.<key>` of one file, or of several."""

    tables: Tables
    texts: Tables  # int32 [rows], numbers of strings


def is_read(feature: Feature) -> bool:
    """Whether a column of the data files gets into the index as it is."""
    if feature.kind == "tensor":
        return math.prod(feature.shape) <= LARGEST_ROW
    return feature.kind == "text" or (feature.kind == "image" and not feature.is_depth)


def why_not(feature: Feature) -> str:
    """Why a column is not in the index."""
    if feature.is_depth:
        return "depth maps are not read"
    if feature.kind == "tensor":
        return f"{list(feature.shape)}; only arrays of at most {LARGEST_ROW} numbers are"
    return f"{feature.dtype} is not read"


def column_shape(feature: Feature) -> tuple[int, ...]:
    """The shape of a value; vectors of one number are stored as numbers."""
    return () if feature.shape == (1,) else feature.shape


def read_part(layout: Layout, part: Part, strings: Strings, images: BinaryIO | None) -> Rows:
    """The columns of a file's episodes; the pictures in it are appended to `images`."""
    path = layout.directory / part.file
    kept = {key: f for key, f in layout.features.items() if is_read(f)}
    file = open_parquet(path)
    names = file.schema_arrow.names
    for key in kept:
        if key not in names:
            raise unknown_key(key, names, where=f"{path}, columns,")
    said = [LANGUAGE] if LANGUAGE in layout.features and LANGUAGE in names else []
    plain = [key for key, f in kept.items() if f.kind != "image"]
    with parquet_errors(path):
        table = file.read(columns=[*plain, *said], use_threads=False)
    total = int(part.lengths.sum())
    if table.num_rows != total:
        raise ValueError(
            f"{path}: expected {total} rows, the length of {len(part.numbers)} episodes in "
            f"meta/episodes, got {table.num_rows}"
        )
    tables, texts = {}, {}
    for key in plain:
        here = f"{path}, {key}"
        if kept[key].kind == "text":
            texts[key] = strings(_texts(table.column(key), here))
        else:
            tables[key] = _tensor(table.column(key), kept[key], here)
    _check_rows(path, layout, part, tables)
    if layout.verify:
        for key in (key for key in tables if key not in OWN_CHECKS):
            check_statistics(
                *(tables[key], part.lengths, part.statistics.get(key, {})),
                names=[f"{path}, episode {n}, {key}" for n in part.numbers.tolist()],
            )
    texts["task"] = strings(_task_texts(path, layout, part, tables["task_index"]))
    for key in said:
        found = _language(table.column(key), part.lengths, tables["timestamp"])
        texts |= {f"{key}.{style}": strings(values) for style, values in found.items()}
    for key in (key for key, f in kept.items() if f.kind == "image"):
        assert images is not None
        tables[key], tables[f"{key}.crc"] = _copy_images(path, layout.directory, key, images)
    return Rows(_named(tables), _named(texts))


def check_statistics(
    values: np.ndarray, lengths: np.ndarray, recorded: Mapping[str, np.ndarray], names: list[str]
) -> None:
    """Compare min, max, mean, std and count of each episode's values [rows ...] with `recorded`.

    LeRobot adds up in float32, so mean and std agree only roughly; min and max are values of the
    data. Statistics of another width are not comparable and left alone.
    """
    rows = values.reshape(len(values), -1).astype(np.float64)
    starts = np.cumsum(lengths) - lengths
    mean = np.add.reduceat(rows, starts) / lengths[:, None]
    square = np.add.reduceat((rows - np.repeat(mean, lengths, axis=0)) ** 2, starts)
    found = {
        "min": np.minimum.reduceat(rows, starts),
        "max": np.maximum.reduceat(rows, starts),
        "mean": mean,
        "std": np.sqrt(square / lengths[:, None]),
        "count": lengths[:, None].astype(np.float64),
    }
    scale = np.maximum(np.abs(found["min"]), np.abs(found["max"]))
    summing = np.minimum(1e-6 + 6e-8 * lengths, 1e-3)[:, None]
    allowed = {
        "min": 1e-6 * scale,
        "max": 1e-6 * scale,
        "mean": summing * scale,
        "std": 2e-3 * scale,  # the root of a small difference of large squares
        "count": np.zeros_like(scale[:, :1]),
    }
    for name in STATISTICS:
        said = recorded.get(name)
        if said is None or said.shape != found[name].shape:
            continue
        with np.errstate(invalid="ignore"):
            near = np.abs(said - found[name]) <= allowed[name]
        near |= (said == found[name]) | (np.isnan(said) & np.isnan(found[name]))
        for episode, dim in np.argwhere(~near)[:1].tolist():
            got, expected = found[name][episode, dim], said[episode, dim]
            raise ValueError(
                f"{names[episode]}: expected {expected:.7g} as the {name} of dimension {dim}, got "
                f"{got:.7g}; the data or the statistics in meta/ are damaged or were edited "
                "(verify=False reads them as they are)"
            )


# -- checks ---------------------------------------------------------------------------------------


def _check_rows(path: Path, layout: Layout, part: Part, tables: Tables) -> None:
    frame = np.arange(int(part.lengths.sum())) - np.repeat(
        np.cumsum(part.lengths) - part.lengths, part.lengths
    )
    expected = {"episode_index": np.repeat(part.numbers, part.lengths), "frame_index": frame}
    if part.first_rows is not None:
        expected["index"] = np.repeat(part.first_rows, part.lengths) + frame
    for key in ("episode_index", "frame_index", "index", "timestamp", "task_index"):
        if key not in tables and (key != "index" or key in expected):
            raise unknown_key(key, tables, where=f"{layout.directory}, features,")
    for key, values in expected.items():
        got = tables[key]
        for row in np.flatnonzero(got != values)[:1].tolist():
            raise ValueError(f"{path}, row {row}: expected {key} {values[row]}, got {got[row]}")
    times = tables["timestamp"]
    wanted = frame / layout.fps
    # A float32 cannot hold the time of a long episode to within LeRobot's tolerance.
    allowed = layout.tolerance_s + np.spacing(np.abs(wanted).astype(np.float32))
    for row in np.flatnonzero(~(np.abs(times - wanted) <= allowed))[:1].tolist():
        raise ValueError(
            f"{path}, row {row}: expected timestamp {wanted[row]:.6f} for frame {frame[row]} at "
            f"{layout.fps:g} frames per second, got {times[row]:.6f} (tolerance_s is "
            f"{layout.tolerance_s:g})"
        )


def _task_texts(path: Path, layout: Layout, part: Part, numbers: np.ndarray) -> list[str]:
    found, where = np.unique(numbers, return_inverse=True)
    for number in found.tolist():
        if number not in layout.texts:
            row = int(np.flatnonzero(numbers == number)[0])
            raise ValueError(
                f"{path}, row {row}: expected task_index among those in meta/tasks "
                f"({len(layout.texts)}), got {number}"
            )
    texts = [layout.texts[number] for number in found.tolist()]
    ends = np.cumsum(part.lengths)
    for episode, said in enumerate(part.tasks):
        used = np.unique(where[ends[episode] - part.lengths[episode] : ends[episode]])
        for text in (texts[i] for i in used.tolist()):
            if said and text not in said:
                raise ValueError(
                    f"{path}, episode {part.numbers[episode]}: its task is {text!r} by meta/tasks, "
                    f"but meta/episodes lists {said}; make them agree"
                )
    return [texts[i] for i in where.tolist()]


# -- columns --------------------------------------------------------------------------------------


def _tensor(column: pa.ChunkedArray, feature: Feature, where: str) -> np.ndarray:
    """[rows ...] of the feature's dtype and shape; nothing is cut off or filled in."""
    values = column.combine_chunks()
    values = values.storage if isinstance(values, pa.ExtensionArray) else values
    sizes: list[int] = []
    while (
        pa.types.is_list(values.type)
        or pa.types.is_large_list(values.type)
        or (pa.types.is_fixed_size_list(values.type))
    ):
        _refuse_nulls(values, where)
        lengths = {n for n in values.value_lengths().unique().to_pylist()}
        if len(lengths) > 1:
            raise ValueError(f"{where}: expected rows of one length, got {sorted(lengths)}")
        sizes += list(lengths)
        values = values.flatten()
    _refuse_nulls(values, where)
    try:
        array = values.to_numpy(zero_copy_only=False)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{where}: expected {feature.dtype}, got {values.type}") from error
    dtype = np.dtype(feature.dtype)
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"{where}: expected {dtype} as in meta/info.json, got {array.dtype}")
    shape = feature.shape if feature.shape not in ((), (1,)) else (1,) if sizes else ()
    if len(column) and tuple(sizes) != shape:
        raise ValueError(f"{where}: expected shape {list(shape)} as in meta/info.json, got {sizes}")
    cast = array.astype(dtype, copy=False)
    if dtype.kind in "iu" and not np.array_equal(cast, array):
        raise ValueError(f"{where}: the values do not fit into {dtype}")
    return cast.reshape(len(column), *column_shape(feature))


def _texts(column: pa.ChunkedArray, where: str) -> list[str]:
    _refuse_nulls(column, where)
    values = column.to_pylist()
    if values and not isinstance(values[0], str):
        raise ValueError(f"{where}: expected string as in meta/info.json, got {column.type}")
    return values


def _refuse_nulls(values: pa.Array | pa.ChunkedArray, where: str) -> None:
    if values.null_count:
        raise ValueError(f"{where}: expected a value in every row, {values.null_count} have none")


def _copy_images(
    path: Path, directory: Path, key: str, images: BinaryIO
) -> tuple[np.ndarray, np.ndarray]:
    """Append a column's encoded pictures to a file.

    Returns offset and size of each, int64 [rows 2], and their checksums, uint32 [rows].
    """
    spans: list[tuple[int, int]] = []
    crcs: list[int] = []
    with parquet_errors(path):
        for batch in open_parquet(path).iter_batches(IMAGE_ROWS, columns=[key], use_threads=False):
            for value in batch.column(key).to_pylist():
                data = _picture(value, directory, f"{path}, {key}, row {len(spans)}")
                spans.append((images.tell(), len(data)))
                crcs.append(crc32c(data))
                images.write(data)
    return np.array(spans, np.int64).reshape(-1, 2), np.array(crcs, np.uint32)


def _picture(value: Any, directory: Path, where: str) -> bytes:
    """The bytes of a stored image, which may be in the table or in a file beside it."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes) and value["bytes"]:
        return value["bytes"]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        try:
            return (directory / value["path"]).read_bytes()
        except OSError as error:
            raise ValueError(f"{where}: {value['path']}: {error.strerror}") from error
    raise ValueError(f"{where}: expected an image with bytes or a path, got {str(value)[:60]}")


# -- language -------------------------------------------------------------------------------------


def _language(
    column: pa.ChunkedArray, lengths: np.ndarray, times: np.ndarray
) -> dict[str, list[str]]:
    """For each style (subtask, plan, ...) the text in force at each row, "" before the first.

    All rows of an episode list the same annotations, each with the time from which it holds. Of
    several of one style and time the first counts.
    """
    starts = np.cumsum(lengths) - lengths
    texts: dict[str, list[str]] = {}
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        rows = column[start].as_py() or []
        rows = [r for r in rows if r.get("style") and r.get("content") and not r.get("camera")]
        for style in {r["style"] for r in rows}:
            said = {r["timestamp"]: r["content"] for r in reversed(rows) if r["style"] == style}
            begins = np.array(sorted(said), np.float64)
            at = np.searchsorted(begins, times[start : start + length] + 1e-6, side="right") - 1
            filled = texts.setdefault(style, [""] * len(times))
            for i, n in enumerate(at.tolist()):
                if n >= 0:
                    filled[start + i] = said[begins[n]]
    return texts


def _named(columns: Tables) -> Tables:
    return {f"steps.{key}": values for key, values in columns.items()}
