"""What a LeRobot data set says about itself: versions 2.0, 2.1 and 3.0 in one form.

    meta/info.json                    version, fps, features, where files lie, splits
    meta/episodes.jsonl               v2: number, length and tasks of each episode
    meta/episodes_stats.jsonl         v2.1: statistics of each episode (v2.0: meta/stats.json)
    meta/tasks.jsonl                  v2: the texts
    meta/episodes/chunk-*/file-*.parquet, meta/tasks.parquet     v3: all of these, and more

Nothing here opens a data file or a video; that what is said agrees with what is there is checked
when the index is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data.index import unknown_key
from pizero.data.lerobot.files import INFO, VERSIONS, read_json, read_lines, read_table

EPISODES = "meta/episodes.jsonl"  # of version 2
STATISTICS = ("min", "max", "mean", "std", "count")
DTYPES = (
    *("bool", "float16", "float32", "float64"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
OTHERS = {"string": "text", "image": "image", "video": "video", "language": "language"}


@dataclass(frozen=True)
class Feature:
    """One entry of `features`: what a column, or a camera's videos, hold."""

    dtype: str
    shape: tuple[int, ...]
    is_depth: bool = False

    @property
    def kind(self) -> str:
        """tensor, text, image, video or language."""
        return "tensor" if self.dtype in DTYPES else OTHERS[self.dtype]


@dataclass(frozen=True)
class Place:
    """Where the episodes lie: `files` [n], below the set's folder, and which of them has each."""

    files: list[str]
    file: np.ndarray  # int64 [episodes]
    start: np.ndarray | None = None  # v3, videos: seconds in the file, float64 [episodes]


@dataclass(frozen=True)
class Meta:
    """All that is said about a set; arrays and lists are over its episodes, by their number."""

    directory: Path
    version: str
    fps: float
    features: Mapping[str, Feature]
    splits: Mapping[str, tuple[int, int]]  # first and last + 1 of the episodes
    texts: Mapping[int, str]  # of the tasks
    numbers: np.ndarray  # int64: episode_index
    lengths: np.ndarray  # int64: frames
    tasks: list[list[str]]  # said to occur in the episode
    data: Place
    videos: Mapping[str, Place]
    first_rows: np.ndarray | None = None  # v3: dataset_from_index
    statistics: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    whole_statistics: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    extra: Mapping[str, list[Any]] = field(default_factory=dict)  # further values of episodes


def read_meta(directory: Path) -> Meta:
    """Read everything below `meta/`; ValueError names the file and what is wrong in it."""
    info = read_json(directory / INFO)
    where = str(directory / INFO)
    version = _get(info, "codebase_version", str, where)
    if version not in VERSIONS:
        raise ValueError(
            f"{where}: expected codebase_version {', '.join(VERSIONS)}, got {version!r}; LeRobot "
            "converts versions"
        )
    features = _features(info, where)
    fps = _get(info, "fps", (int, float), where)
    if not 0 < fps < 1e6:
        raise ValueError(f"{where}: expected fps > 0, got {fps}")
    read = _read_v3 if version == "v3.0" else _read_v2
    episodes = read(directory, info, [k for k, f in features.items() if f.kind == "video"])
    numbers, lengths = episodes["numbers"], episodes["lengths"]
    if len(numbers) == 0 or (lengths < 1).any() or (np.diff(numbers) < 1).any() or numbers[0] < 0:
        raise ValueError(
            f"{directory}/meta: expected episodes of at least one frame, numbered upwards, got "
            f"numbers {_short(numbers)} of lengths {_short(lengths)}"
        )
    for name, found in (("total_episodes", len(numbers)), ("total_frames", int(lengths.sum()))):
        if (said := _get(info, name, int, where)) != found:
            raise ValueError(f"{where}: {name} is {said}, but meta/episodes has {found}")
    return Meta(
        directory=directory,
        version=version,
        fps=fps,
        features=features,
        splits=_splits(info, where, len(numbers)),
        **episodes,
    )


# -- both versions --------------------------------------------------------------------------------


def _features(info: Mapping[str, Any], where: str) -> dict[str, Feature]:
    features = {}
    for key, node in _get(info, "features", dict, where).items():
        here = f"{where}, feature {key!r}"
        if not isinstance(node, dict):
            raise ValueError(f"{here}: expected an object, got {node!r}")
        dtype = _get(node, "dtype", str, here)
        if dtype not in (*DTYPES, *OTHERS):
            raise unknown_key(dtype, (*DTYPES, *OTHERS), where=f"{here}, dtypes,")
        shape = node.get("shape") or []
        if not isinstance(shape, list) or not all(_is_int(n) and n >= 0 for n in shape):
            raise ValueError(f"{here}: expected a shape of whole numbers, got {shape!r}")
        facts = {**(node.get("video_info") or {}), **(node.get("info") or {})}
        is_depth = bool(facts.get("is_depth_map") or facts.get("video.is_depth_map"))
        features[key] = Feature(dtype, tuple(shape), is_depth)
    return features


def _splits(info: Mapping[str, Any], where: str, total: int) -> dict[str, tuple[int, int]]:
    splits = {}
    named = _all([info.get("splits") or {"train": f"0:{total}"}], dict, f"{where}, splits")[0]
    for name, text in named.items():
        first, _, last = str(text).partition(":")
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) <= total):
            raise ValueError(
                f"{where}: expected split {name!r} as FIRST:LAST of {total} episodes, got {text!r}"
            )
        splits[name] = (int(first), int(last))
    return splits


def _place(names: Sequence[str], start: np.ndarray | None = None) -> Place:
    files = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return Place(list(files), np.array([files[name] for name in names], np.int64), start)


def _fill(template: Any, where: str, **values: Any) -> str:
    """A path template of `info.json` with its values."""
    try:
        return template.format(**values)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected a path with {', '.join(f'{{{k}}}' for k in values)}, got "
            f"{template!r}: {type(error).__name__} {error}"
        ) from error


# -- version 2 ------------------------------------------------------------------------------------


def _read_v2(directory: Path, info: Mapping[str, Any], cameras: list[str]) -> dict[str, Any]:
    where = str(directory / INFO)
    chunk = _get(info, "chunks_size", int, where)
    if chunk < 1:
        raise ValueError(f"{where}: expected chunks_size >= 1, got {chunk}")
    rows = [(_get(r, "episode_index", int, w), r, w) for r, w in read_lines(directory / EPISODES)]
    rows.sort(key=lambda row: row[0])
    numbers = [number for number, _, _ in rows]

    def place(template: Any, camera: str = "") -> Place:
        return _place(
            [
                _fill(template, where, episode_chunk=n // chunk, episode_index=n, video_key=camera)
                for n in numbers
            ]
        )

    tasks = {
        _get(row, "task_index", int, here): _get(row, "task", str, here)
        for row, here in read_lines(directory / "meta/tasks.jsonl")
    }
    return {
        "texts": tasks,
        "numbers": _integers(numbers, f"{EPISODES}, episode_index"),
        "lengths": _integers(
            [_get(row, "length", int, at) for _, row, at in rows], f"{EPISODES}, length"
        ),
        "tasks": [_strings(row.get("tasks"), f"{at}, tasks") for _, row, at in rows],
        "data": place(info.get("data_path")),
        "videos": {camera: place(info.get("video_path"), camera) for camera in cameras},
        "extra": _further([row for _, row, _ in rows], {"episode_index", "length", "tasks"}),
        **_statistics_v2(directory, numbers),
    }


def _statistics_v2(directory: Path, numbers: list[int]) -> dict[str, Any]:
    each, whole = directory / "meta/episodes_stats.jsonl", directory / "meta/stats.json"
    if not each.exists():
        tree = read_json(whole) if whole.exists() else {}
        return {"whole_statistics": {k: _collect([v], str(whole)) for k, v in tree.items()}}
    rows = {
        _get(r, "episode_index", int, w): _get(r, "stats", dict, w) for r, w in read_lines(each)
    }
    missing = [n for n in numbers if n not in rows]
    if missing:
        raise ValueError(f"{each}: expected every episode, got none for {_short(missing)}")
    keys = dict.fromkeys(key for n in numbers for key in rows[n])
    stacked = {key: _collect([rows[n].get(key) for n in numbers], str(each)) for key in keys}
    return {"statistics": stacked}


def _collect(nodes: list[Any], where: str) -> dict[str, np.ndarray]:
    """[{min: [d], ...}] as {min: [n d], ...}, without what is missing or of several sizes."""
    if not all(isinstance(node, dict | None) for node in nodes):
        raise ValueError(f"{where}: expected objects of statistics, got {_short(nodes)}")
    return {
        name: stacked
        for name in STATISTICS
        if (stacked := _stack([(node or {}).get(name) for node in nodes], where)) is not None
    }


def _stack(values: list[Any], where: str) -> np.ndarray | None:
    if any(value is None for value in values):
        return None
    try:
        rows = [np.asarray(value, np.float64).reshape(-1) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected statistics to be numbers: {error}") from error
    return np.stack(rows) if len({len(row) for row in rows}) == 1 else None


# -- version 3 ------------------------------------------------------------------------------------


def _read_v3(directory: Path, info: Mapping[str, Any], cameras: list[str]) -> dict[str, Any]:
    where = str(directory / INFO)
    columns = _episode_columns(directory)
    of = str(directory / "meta/episodes")
    order = np.argsort(_whole(columns, "episode_index", of), kind="stable").tolist()
    columns = {key: [values[i] for i in order] for key, values in columns.items()}
    numbers, lengths = _whole(columns, "episode_index", of), _whole(columns, "length", of)
    first = _whole(columns, "dataset_from_index", of)
    last = _whole(columns, "dataset_to_index", of)
    for number in np.flatnonzero(last - first != lengths)[:1].tolist():
        raise ValueError(
            f"{of}, episode {numbers[number]}: {lengths[number]} frames, but "
            f"dataset_from_index:dataset_to_index is {first[number]}:{last[number]}"
        )

    def place(template: Any, prefix: str, **values: Any) -> Place:
        chunks = _whole(columns, f"{prefix}/chunk_index", of).tolist()
        files = _whole(columns, f"{prefix}/file_index", of).tolist()
        names = [
            _fill(template, where, chunk_index=chunk, file_index=file, **values)
            for chunk, file in zip(chunks, files, strict=True)
        ]
        start = columns.get(f"{prefix}/from_timestamp")
        if start is None or prefix == "data":
            return _place(names)
        return _place(names, np.array(_all(start, (int, float), f"{of}, {prefix}"), np.float64))

    known = ("episode_index", "length", "tasks", "dataset_from_index", "dataset_to_index")
    prefixes = ("data/", "videos/", "meta/", "stats/")
    further = {k: v for k, v in columns.items() if k not in known and not k.startswith(prefixes)}
    statistics: dict[str, dict[str, list]] = {}
    for key, values in columns.items():
        if key.startswith("stats/"):
            feature, _, name = key.removeprefix("stats/").rpartition("/")
            statistics.setdefault(feature, {})[name] = values
    return {
        "texts": _tasks_v3(directory / "meta/tasks.parquet"),
        "numbers": numbers,
        "lengths": lengths,
        "tasks": [
            _strings(value, f"{of}, tasks") for value in columns.get("tasks", [None] * len(numbers))
        ],
        "data": place(info.get("data_path"), "data"),
        "videos": {
            camera: place(info.get("video_path"), f"videos/{camera}", video_key=camera)
            for camera in cameras
        },
        "first_rows": first,
        "extra": {key: values for key, values in further.items() if _is_plain(values)},
        "statistics": {
            feature: {
                name: stacked
                for name, values in found.items()
                if (stacked := _stack(values, f"{of}, stats/{feature}")) is not None
            }
            for feature, found in statistics.items()
        },
    }


def _episode_columns(directory: Path) -> dict[str, list[Any]]:
    """The columns of all files below meta/episodes, without those of quantiles and pictures."""
    files = sorted((directory / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise ValueError(f"{directory}/meta/episodes: expected parquet files, got none")
    columns: dict[str, list[Any]] = {}
    rows = 0
    for file in files:
        table = read_table(file, lambda name: not name.startswith("stats/") or _is_kept(name))
        for name in table.column_names:
            columns.setdefault(name, [None] * rows).extend(table.column(name).to_pylist())
        rows += table.num_rows
        for values in columns.values():
            values.extend([None] * (rows - len(values)))
    return columns


def _is_kept(name: str) -> bool:
    feature, _, statistic = name.removeprefix("stats/").rpartition("/")
    return statistic in STATISTICS and not feature.startswith("observation.images.")


def _tasks_v3(file: Path) -> dict[int, str]:
    """The texts by number; they are the index of a pandas table, under whatever name it had."""
    table = read_table(file)
    others = [name for name in table.column_names if name != "task_index"]
    name = next((n for n in ("task", "__index_level_0__") if n in others), (others or [""])[0])
    if "task_index" not in table.column_names or not name:
        raise ValueError(
            f"{file}: expected columns task_index and task, got {', '.join(table.column_names)}"
        )
    numbers = _all(table.column("task_index").to_pylist(), int, f"{file}, task_index")
    return dict(
        zip(numbers, _all(table.column(name).to_pylist(), str, f"{file}, {name}"), strict=True)
    )


# -- reading --------------------------------------------------------------------------------------


def _get(tree: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if key not in tree:
        raise unknown_key(key, tree, where=where)
    return _all([tree[key]], kind, f"{where}, {key}")[0]


def _all(values: list[Any], kind: type | tuple[type, ...], where: str) -> list[Any]:
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            names = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(k.__name__ for k in names)
            raise ValueError(f"{where}: expected {expected}, got {value!r}")
    return values


def _integers(values: list[Any], where: str) -> np.ndarray:
    """Whole numbers as int64 [n]."""
    try:
        return np.array(_all(values, int, where), np.int64)
    except OverflowError as error:
        raise ValueError(f"{where}: {error}") from error


def _whole(columns: Mapping[str, list[Any]], key: str, where: str) -> np.ndarray:
    """A column of whole numbers, int64 [episodes]."""
    if key not in columns:
        raise unknown_key(key, columns, where=where)
    return _integers(columns[key], f"{where}, {key}")


def _strings(values: Any, where: str) -> list[str]:
    """A list of texts, one text, or nothing."""
    return _all(values if isinstance(values, list) else [values], str, where) if values else []


def _further(rows: list[dict[str, Any]], known: set[str]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for row in rows for key in row if key not in known)
    columns = {key: [row.get(key) for row in rows] for key in keys}
    return {key: values for key, values in columns.items() if _is_plain(values)}


def _is_plain(values: list[Any]) -> bool:
    """Whether values are all numbers, or all texts, and so fit into one column."""
    return all(isinstance(v, int | float) for v in values) or all(
        isinstance(v, str) for v in values
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(values: Any) -> str:
    text = ", ".join(map(str, list(values)[:8]))
    return text + (", ..." if len(values) > 8 else "")
