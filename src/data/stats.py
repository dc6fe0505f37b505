"""Statistics of states and actions: computed from data, read from and written to files.

Names here are `state` and `action`. Files come in several dialects (`DIALECTS`), ours being
openpi's with more entries (min, max, count); which one a file has shows in its structure.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save

from pizero.data.dataset import EpisodeDataset
from pizero.data.files import parse_json, read_json, write_whole
from pizero.data.index import fingerprint
from pizero.data.mix import Mix
from pizero.data.normalize import subtract_state

if TYPE_CHECKING:
    from pizero.data.robot import Robot

_ARRAYS = ("mean", "std", "min", "max", "q01", "q99")


@dataclass(frozen=True)
class Statistics:
    """Per dimension [d], over all frames; an entry a file does not have is None.

    Mean and std, or q01 and q99, or min and max are enough.
    """

    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    min: np.ndarray | None = None
    max: np.ndarray | None = None
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    count: int = 0
    mask: np.ndarray | None = None  # False: a dimension that the data's policies leave as it is

    @property
    def size(self) -> int:
        """Dimensions."""
        return next(len(v) for k in _ARRAYS if (v := getattr(self, k)) is not None)

    @classmethod
    def of(cls, values: np.ndarray) -> Statistics:
        """Exact statistics of values [n d]; std is that of the population."""
        if values.ndim != 2 or not len(values):
            raise ValueError(f"expected values [n d] with n > 0, got shape {list(values.shape)}")
        columns = [_of_column(np.array(column, np.float64)) for column in values.T]
        found = {name: np.array([c[name] for c in columns]) for name in _ARRAYS}
        return cls(**found, count=len(values))

    def cut(self, size: int) -> Statistics:
        """The first `size` dimensions, for statistics that were saved padded to a model's width."""
        if size > self.size:
            raise ValueError(f"expected statistics of at least {size} dimensions, got {self.size}")
        kept = {name: getattr(self, name) for name in (*_ARRAYS, "mask")}
        return replace(self, **{k: v[:size] for k, v in kept.items() if v is not None})


def compute_statistics(
    dataset: EpisodeDataset | Mix,
    *,
    delta_mask: Sequence[bool] | None = None,
    robot: Robot | None = None,
) -> dict[str, Statistics]:
    """Statistics of `state` and `action` over a training split, from the index alone.

    They are of what the policy will see: after the maps of `robot`, whose delta mask holds unless
    another is given; with one, of each of the `horizon` actions ahead minus the present state on
    the masked dimensions, without those past the episode's end.
    """
    if robot is not None and delta_mask is None:
        delta_mask = robot.delta_mask
    parts = list(dataset.datasets.values()) if isinstance(dataset, Mix) else [dataset]
    rows = [_Rows(part, robot, delta_mask) for part in parts]
    masks = {part.action_mask for part in parts}
    if len(masks) > 1:
        raise ValueError(
            f"expected data sets of one action_mask, got {masks}; compute one for each"
        )
    mask = masks.pop()
    found = {"action": _statistics([row.actions for row in rows])}
    if mask is not None:
        found["action"] = replace(found["action"], mask=np.array(mask, bool))
    if all(part.state_dim for part in parts):
        found["state"] = _statistics([row.states for row in rows])
    return found


# -- files ----------------------------------------------------------------------------------------

_NAMES = {  # of a group in some file -> ours
    "state": "state",
    "proprio": "state",
    "observation.state": "state",
    "action": "action",
    "actions": "action",
}
_FIELDS = {"p01": "q01", "p99": "q99"}
_OTHERS = ("mask", "count", "q10", "q50", "q90")
_OPENPI = ("mean", "std", "q01", "q99")


@dataclass(frozen=True)
class _Dialect:
    """How a project spells statistics; `required` are entries its readers fail without."""

    state: str
    action: str
    entries: tuple[str, ...] = _ARRAYS
    required: tuple[str, ...] = ()


DIALECTS = {
    "pizero": _Dialect("state", "actions"),
    "openpi": _Dialect("state", "actions", _OPENPI, ("mean", "std")),
    "giga": _Dialect("observation.state", "action", _OPENPI, ("mean", "std")),
    "octo": _Dialect("proprio", "action"),
    "openvla": _Dialect("proprio", "action"),
    "lerobot": _Dialect("observation.state", "action"),
    "lerobot_processor": _Dialect("observation.state", "action"),
}


def save_statistics(
    statistics: Mapping[str, Statistics],
    path: str | Path,
    *,
    dialect: str = "pizero",
    dataset: str = "dataset",
) -> None:
    """Write statistics as the project named by `dialect` reads them, atomically.

    pizero, openpi     norm_stats.json
    giga               norm_stats.json with LeRobot's names
    octo               also open-pi-zero's; p01, p99, num_transitions
    openvla            the same below the name of the `dataset`, with masks
    lerobot            meta/stats.json
    lerobot_processor  the .safetensors of a normalizer step
    """
    if dialect not in DIALECTS:
        raise ValueError(f"expected a dialect of {', '.join(DIALECTS)}, got {dialect!r}")
    rule = DIALECTS[dialect]
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, found in sorted(statistics.items()):
        arrays = {k: v for k in rule.entries if (v := getattr(found, k)) is not None}
        if lacking := [k for k in rule.required if k not in arrays]:
            raise ValueError(f"{dialect} files need {lacking}, which the {name} statistics lack")
        groups[{"state": rule.state, "action": rule.action}.get(name, name)] = arrays
    if dialect == "lerobot_processor":
        tensors = {
            f"{g}.{k}": v.astype(np.float32) for g, a in groups.items() for k, v in a.items()
        }
        write_whole(path, save(tensors))
    else:
        tree = _json_tree(groups, statistics, dialect, dataset)
        write_whole(path, json.dumps(tree, indent=2) + "\n")


def save_statistics_of_each(
    datasets: Mapping[str, Mapping[str, Statistics]], path: str | Path
) -> None:
    """Write the statistics of several data sets into one file of ours, by their names."""
    rule, tree = DIALECTS["pizero"], {}
    for dataset, statistics in datasets.items():
        groups = {
            {"state": rule.state, "action": rule.action}.get(name, name): {
                k: v for k in rule.entries if (v := getattr(found, k)) is not None
            }
            for name, found in sorted(statistics.items())
        }
        tree[dataset] = _json_tree(groups, statistics, "pizero", dataset)["norm_stats"]
    write_whole(path, json.dumps(_signed(tree), indent=2) + "\n")


def statistics_names(path: str | Path) -> list[str]:
    """The data sets that a file holds statistics of; empty where it does not name any."""
    tree = _read(_find(path))
    tree = tree.get("norm_stats", tree) if isinstance(tree, Mapping) else {}
    return _names_in(tree)


def load_statistics(
    source: str | Path | Mapping[str, Any], *, dataset: str | None = None
) -> dict[str, Statistics]:
    """Statistics by name from a file, from its JSON tree, or from Statistics as they are.

    A bare name such as "bridge" means the published statistics that come with the library.
    `dataset` picks one from a file that holds those of several, as OpenVLA's do.
    """
    where, tree = "the given statistics", source
    if isinstance(source, str | Path):
        path = _find(source)
        where, tree = str(path), _read(path)
    if not isinstance(tree, Mapping) or not isinstance(tree.get("norm_stats", tree), Mapping):
        raise ValueError(f"{where}: expected groups 'state' and 'actions', got {type(tree)}")
    if "digest" in tree and tree["digest"] != fingerprint(tree.get("norm_stats")):
        raise ValueError(
            f"{where} is damaged or was changed by hand; if that was meant, remove its digest"
        )
    tree = _select(tree.get("norm_stats", tree), dataset, where)
    count = _count(tree.get("num_transitions"), f"{where}, num_transitions")
    found: dict[str, Statistics] = {}
    for key, value in tree.items():
        if key not in _NAMES or not _is_group(value):
            continue
        if _NAMES[key] in found:
            raise ValueError(f"{where}: more than one group of {_NAMES[key]!r}, {key!r} is one")
        found[_NAMES[key]] = _from_json(value, f"{where}, {key}", count)
    if not found:
        raise ValueError(f"{where}: expected groups 'state' and 'actions', got {sorted(tree)}")
    return found


def published_statistics() -> dict[str, Path]:
    """The files of published statistics that come with the library, by name."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "config", package / "config"):
        if files := sorted((folder / "robot" / "statistics").glob("*.json")):
            return {file.stem: file for file in files}
    return {}


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    published = published_statistics()
    if str(source) in published:
        return published[str(source)]
    near = sorted(p.name for p in path.parent.glob("*.json"))
    raise ValueError(
        f"no statistics at {path}: expected a JSON file or one of {', '.join(published)}; that "
        f"folder has {', '.join(near) or 'no JSON file'}. compute_statistics makes one"
    )


def _read(path: Path) -> Mapping[str, Any]:
    """The file as one tree, group -> entry -> list."""
    if path.suffix == ".safetensors":
        tree: dict[str, Any] = {}
        for name, tensor in load_file(path).items():
            group, _, entry = name.rpartition(".")
            tree.setdefault(group, {})[entry] = tensor
        return tree
    if path.suffix != ".jsonl":
        return read_json(path)
    try:
        return _combine([parse_json(line)["stats"] for line in path.read_text().splitlines()])
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected statistics of each episode, got {what}") from error


def _combine(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of all frames from those of each episode (LeRobot v2.1 keeps only the latter)."""
    tree = {}
    for key in _NAMES.keys() & (episodes[0].keys() if episodes else set()):
        rows = {k: np.array([e[key][k] for e in episodes], np.float64) for k in _ARRAYS[:4]}
        counts = np.array([e[key]["count"] for e in episodes], np.float64).reshape(-1, 1)
        mean = (counts * rows["mean"]).sum(0) / counts.sum()
        square = (counts * (rows["std"] ** 2 + (rows["mean"] - mean) ** 2)).sum(0) / counts.sum()
        tree[key] = {
            "mean": mean,
            "std": np.sqrt(square),
            "min": rows["min"].min(0),
            "max": rows["max"].max(0),
            "count": int(counts.sum()),
        }
    return tree


def _select(tree: Mapping[str, Any], dataset: str | None, where: str) -> Mapping[str, Any]:
    """The part that holds groups, where they lie below names of data sets."""
    names = _names_in(tree)
    if not names:
        return tree
    if dataset is None and len(names) > 1:
        raise ValueError(f"{where}: holds statistics of {', '.join(names)}; name one (dataset=)")
    if dataset is not None and dataset not in names:
        raise ValueError(f"{where}: expected a data set of {', '.join(names)}, got {dataset!r}")
    return tree[dataset or names[0]]


def _names_in(tree: Mapping[str, Any]) -> list[str]:
    return [] if _has_groups(tree) else [k for k, v in tree.items() if _has_groups(v)]


def _signed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """With a digest, so that a damaged number is noticed."""
    return {"norm_stats": tree, "digest": fingerprint(tree)}


def _json_tree(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    statistics: Mapping[str, Statistics],
    dialect: str,
    dataset: str,
) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    renamed = {"q01": "p01", "q99": "p99"} if dialect == "octo" else {}
    for (name, arrays), found in zip(
        groups.items(), (v for _, v in sorted(statistics.items())), strict=True
    ):
        tree[name] = {renamed.get(k, k): v.tolist() for k, v in arrays.items()}
        if dialect in ("pizero", "openvla") and found.mask is not None:
            tree[name]["mask"] = found.mask.tolist()
        if dialect == "pizero":
            tree[name]["count"] = found.count
        elif dialect == "lerobot":
            tree[name]["count"] = [found.count]
    if dialect == "pizero":
        return _signed(tree)
    if dialect in ("openpi", "giga"):
        return {"norm_stats": tree}
    if dialect in ("octo", "openvla"):
        tree["num_transitions"] = max((s.count for s in statistics.values()), default=0)
    return {dataset: tree} if dialect == "openvla" else tree


def _from_json(tree: Any, where: str, count: int) -> Statistics:
    if isinstance(tree, Statistics):
        return tree
    named = {_FIELDS.get(str(k), str(k)): v for k, v in tree.items()}
    for key in named.keys() - {*_ARRAYS, *_OTHERS}:
        lacking = [name for name in _ARRAYS if name not in named]
        if near := difflib.get_close_matches(key, lacking, 1, 0.8):
            raise ValueError(f"{where}: unknown entry {key!r}; did you mean {near[0]!r}?")
    arrays = {}
    for key in _ARRAYS:
        if named.get(key) is not None:
            try:
                arrays[key] = np.asarray(named[key], np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}, {key}: expected numbers, got {error}") from error
    sizes = {k: v.shape for k, v in arrays.items()}
    whole = any({a, b} <= set(sizes) for a, b in zip(_ARRAYS[::2], _ARRAYS[1::2], strict=True))
    if not whole or len(set(sizes.values())) != 1:
        raise ValueError(
            f"{where}: expected mean, std and others of one length, or q01 and q99 alone, got "
            f"{sizes}"
        )
    if len(next(iter(sizes.values()))) != 1:
        raise ValueError(f"{where}: expected vectors [d], got {sizes}")
    _expect_sense(arrays, where)
    mask = None if named.get("mask") is None else np.asarray(named["mask"], bool)
    if mask is not None and mask.shape not in sizes.values():
        raise ValueError(f"{where}: the mask has {len(mask)} entries, the others {sizes}")
    count = _count(named.get("count", count), f"{where}, count")
    return Statistics(**arrays, count=count, mask=mask)


def _count(value: Any, where: str) -> int:
    """A number of frames, alone or in a list as LeRobot has it; 0 where there is none."""
    try:
        return int(np.max(value or 0))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected a number, got {value!r}") from error


def _expect_sense(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Refuse numbers that no data can have."""
    for key, values in arrays.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{where}, {key}: expected finite numbers, got {values.tolist()}")
    if "std" in arrays and (arrays["std"] < 0).any():
        raise ValueError(f"{where}, std: expected numbers >= 0, got {arrays['std'].tolist()}")
    for low, high in (
        ("min", "q01"),
        ("q01", "q99"),
        ("q99", "max"),
        ("min", "mean"),
        ("mean", "max"),
    ):
        if low in arrays and high in arrays:
            slack = 1e-4 * (np.abs(arrays[low]) + np.abs(arrays[high]))  # float32 files, estimates
            if wrong := np.flatnonzero(arrays[low] > arrays[high] + slack).tolist():
                raise ValueError(
                    f"{where}: expected {low} <= {high}, dimensions {wrong} are not so"
                )


def _is_group(value: Any) -> bool:
    known = {*_ARRAYS, *_FIELDS}
    return isinstance(value, Statistics) or (isinstance(value, Mapping) and bool(known & {*value}))


def _has_groups(tree: Any) -> bool:
    return isinstance(tree, Mapping) and any(
        key in _NAMES and _is_group(value) for key, value in tree.items()
    )


# -- rows -----------------------------------------------------------------------------------------

MEMORY = 2**28  # numbers that are held at once, as float64
BLOCK = 2**18  # rows that are encoded at once

Blocks = Callable[[], Iterator[np.ndarray]]  # values [n d] in blocks, from the beginning each time


@dataclass(frozen=True)
class _Rows:
    """What a policy sees of a data set, in blocks."""

    data: EpisodeDataset
    robot: Robot | None
    delta_mask: Sequence[bool] | None

    def states(self) -> Iterator[np.ndarray]:
        for rows in self._rows(0):
            yield self._state(rows)

    def actions(self) -> Iterator[np.ndarray]:
        """Each action once, or relative to the state from which it is one of the chunk."""
        data = self.data
        for ahead in range(data.horizon if self.delta_mask else 1):
            for rows in self._rows(ahead):
                values = data.action_table[rows + ahead * data.stride]
                if self.robot is not None:
                    values = self.robot.encode_actions(values)
                if self.delta_mask:
                    values = subtract_state(values, self._state(rows), self.delta_mask)
                yield values

    def _state(self, rows: np.ndarray) -> np.ndarray:
        values = self.data.state_table[rows]
        return values if self.robot is None else self.robot.encode_state(values)

    def _rows(self, ahead: int) -> Iterator[np.ndarray]:
        """Rows of the tables that have a step so far ahead in their episode."""
        rows = self.data.rows
        rows = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        if ahead:
            rows = rows[self.data.steps_left >= ahead * self.data.stride]
        for start in range(0, len(rows), BLOCK):
            yield rows[start : start + BLOCK]


def _statistics(sources: Sequence[Blocks]) -> Statistics:
    """Exact statistics of all rows, a few dimensions at a time where they are very many."""
    shapes = [block.shape for source in sources for block in source()]
    widths = sorted({width for _, width in shapes})
    if len(widths) != 1:
        raise ValueError(f"expected data sets of one width, got {widths}; compute one for each")
    count, width = sum(n for n, _ in shapes), widths[0]
    at_once = max(1, MEMORY // count)
    columns: list[dict[str, float]] = []
    for first in range(0, width, at_once):
        values = np.empty((min(at_once, width - first), count))
        done = 0
        for source in sources:
            for block in source():
                values[:, done : done + len(block)] = block[:, first : first + len(values)].T
                done += len(block)
        columns += [_of_column(column) for column in values]
    found = {name: np.array([c[name] for c in columns]) for name in _ARRAYS}
    return Statistics(**found, count=count)


def _of_column(values: np.ndarray) -> dict[str, float]:
    """Statistics of one dimension, float64 [n], whose order is lost."""
    found = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    q01, q99 = np.quantile(values, [0.01, 0.99], overwrite_input=True)
    return found | {"q01": q01, "q99": q99}
