"""Statistics of states and actions, and the normalisation made from them.

The JSON layout is openpi's `norm_stats.json` with three more entries (min, max, count); files of
Octo and OpenVLA (p01/p99, `proprio`) are read as well. Names here are `state` and `action`.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data.dataset import RldsDataset
from pizero.data.mix import Mix

_NAMES = {"actions": "action", "proprio": "state"}
_ARRAYS = ("mean", "std", "min", "max", "q01", "q99")
_FIELDS = {"p01": "q01", "p99": "q99"}
_NEEDS = {
    "z_score": ("mean", "std"),
    "quantile": ("q01", "q99"),
    "min_max": ("min", "max"),
    "identity": (),
}


@dataclass(frozen=True)
class Statistics:
    """Per dimension [d], over all frames; an entry a file does not have is None."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray | None = None
    max: np.ndarray | None = None
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    count: int = 0

    @property
    def size(self) -> int:
        """Dimensions."""
        return len(self.mean)

    @classmethod
    def of(cls, values: np.ndarray) -> Statistics:
        """Exact statistics of values [n d]; std is that of the population."""
        if values.ndim != 2 or not len(values):
            raise ValueError(f"expected values [n d] with n > 0, got shape {list(values.shape)}")
        values = np.asarray(values, np.float64)
        q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
        return cls(
            mean=values.mean(0),
            std=values.std(0),
            min=values.min(0),
            max=values.max(0),
            q01=q01,
            q99=q99,
            count=len(values),
        )

    def cut(self, size: int) -> Statistics:
        """The first `size` dimensions, for statistics that were saved padded to a model's width."""
        if size > self.size:
            raise ValueError(f"expected statistics of at least {size} dimensions, got {self.size}")
        kept = {name: getattr(self, name) for name in _ARRAYS}
        return replace(self, **{k: v[:size] for k, v in kept.items() if v is not None})


def compute_statistics(
    dataset: RldsDataset | Mix, *, delta_mask: Sequence[bool] | None = None
) -> dict[str, Statistics]:
    """Statistics of `state` and `action` over a training split, from the index alone.

    With `delta_mask`, actions count as the policy will see them: each of the `horizon` actions
    ahead minus the present state on the masked dimensions, without those past the episode's end.
    """
    parts = list(dataset.datasets.values()) if isinstance(dataset, Mix) else [dataset]
    actions = np.concatenate([_action_rows(part, delta_mask) for part in parts])
    found = {"action": Statistics.of(actions)}
    if all(part.state_dim for part in parts):
        found["state"] = Statistics.of(np.concatenate([part.states for part in parts]))
    return found


def save_statistics(statistics: Mapping[str, Statistics], path: str | Path) -> None:
    """Write `norm_stats`-style JSON atomically."""
    names = {ours: theirs for theirs, ours in _NAMES.items() if theirs == "actions"}
    tree = {names.get(k, k): _to_json(v) for k, v in sorted(statistics.items())}
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"norm_stats": tree}, indent=2) + "\n")
    os.replace(temporary, path)


def load_statistics(source: str | Path | Mapping[str, Any]) -> dict[str, Statistics]:
    """Statistics by name from a file, from its JSON tree, or from Statistics as they are."""
    where = "the given statistics"
    if isinstance(source, str | Path):
        where = str(source)
        path = Path(source).expanduser()
        if not path.is_file():
            near = sorted(p.name for p in path.parent.glob("*.json"))
            raise ValueError(
                f"no statistics at {path}: expected a JSON file; that folder has "
                f"{', '.join(near) or 'no JSON file'}. compute_statistics makes one"
            )
        tree: Mapping[str, Any] = json.loads(path.read_text())
    else:
        tree = source
    if "norm_stats" in tree:
        tree = tree["norm_stats"]
    elif len(tree) == 1 and not _has_groups(tree) and _has_groups(next(iter(tree.values()))):
        tree = next(iter(tree.values()))  # OpenVLA nests everything under the dataset's name
    found = {_NAMES.get(k, k): _from_json(v, f"{where}, {k}") for k, v in tree.items() if _is(v)}
    if not found:
        raise ValueError(f"{where}: expected groups 'state' and 'actions', got {sorted(tree)}")
    return found


class Normalizer:
    """Maps robot units to what the model sees, and back; arrays [... d].

    z_score     (x - mean) / (std + epsilon)
    quantile    2 (x - q01) / (q99 - q01 + epsilon) - 1
    min_max     2 (x - min) / (max - min + epsilon) - 1
    identity    x

    `mask` False leaves a dimension as it is (grippers). A dimension whose spread (std, or the
    range) is below `min_scale` is constant for our purposes: it is only centred, not divided, so
    noise in it cannot blow up; with `min_scale=0` the formula applies regardless, as in openpi.
    `clip` bounds the normalised values on the way in.
    """

    def __init__(
        self,
        *,
        kind: str,
        statistics: Statistics,
        mask: Sequence[bool] | None = None,
        clip: float | None = None,
        epsilon: float = 1e-6,
        min_scale: float = 1e-4,
    ) -> None:
        if kind not in _NEEDS:
            near = difflib.get_close_matches(kind, _NEEDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"expected normalization {', '.join(_NEEDS)}, got {kind!r}{hint}")
        missing = [name for name in _NEEDS[kind] if getattr(statistics, name) is None]
        if missing:
            raise ValueError(f"{kind} normalization needs {missing}, which the statistics lack")
        self.kind, self.clip, self.size = kind, clip, statistics.size
        center, scale = _center_and_scale(kind, statistics, epsilon, min_scale)
        if mask is not None:
            if len(mask) != self.size:
                raise ValueError(f"mask has {len(mask)} entries, statistics {self.size} dimensions")
            center = np.where(mask, center, 0.0)
            scale = np.where(mask, scale, 1.0)
        self.center, self.scale = center, scale

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Robot units to model units."""
        y = (self._checked(x) - self.center) / self.scale
        return y if self.clip is None else np.clip(y, -self.clip, self.clip)

    def denormalize(self, y: np.ndarray) -> np.ndarray:
        """Model units to robot units."""
        return self._checked(y) * self.scale + self.center

    def _checked(self, x: np.ndarray) -> np.ndarray:
        if x.shape[-1] != self.size:
            raise ValueError(
                f"expected {self.size} dimensions as in the statistics, got values of shape "
                f"{list(x.shape)}"
            )
        return x


def _center_and_scale(
    kind: str, statistics: Statistics, epsilon: float, min_scale: float
) -> tuple[np.ndarray, np.ndarray]:
    if kind == "identity":
        return np.zeros(statistics.size), np.ones(statistics.size)
    if kind == "z_score":
        middle = center = statistics.mean
        spread, scale = statistics.std, statistics.std + epsilon
    else:
        low, high = (getattr(statistics, name) for name in _NEEDS[kind])
        spread, middle = high - low, (low + high) / 2
        # 2 (x - low) / s - 1 = (x - (low + s / 2)) / (s / 2) with s = spread + epsilon
        scale = (spread + epsilon) / 2
        center = low + scale
    is_constant = spread < min_scale
    return np.where(is_constant, middle, center), np.where(is_constant, 1.0, scale)


def _action_rows(dataset: RldsDataset, delta_mask: Sequence[bool] | None) -> np.ndarray:
    if delta_mask is None:
        return dataset.actions
    starts, lengths = dataset.episode_starts, dataset.episode_lengths
    actions, states = dataset.actions, dataset.states
    left = np.repeat(starts + lengths, lengths) - np.arange(len(dataset))
    rows = [np.flatnonzero(left > ahead) for ahead in range(dataset.horizon)]
    pieces = [
        subtract_state(actions[r + ahead], states[r], delta_mask) for ahead, r in enumerate(rows)
    ]
    return np.concatenate(pieces)


def subtract_state(
    actions: np.ndarray, state: np.ndarray, delta_mask: Sequence[bool], *, sign: int = -1
) -> np.ndarray:
    """`actions` [... A] minus the state [... S] on the masked leading dimensions (plus: sign 1)."""
    mask = np.asarray(delta_mask, bool)
    if len(mask) > min(actions.shape[-1], state.shape[-1]):
        raise ValueError(
            f"delta_mask has {len(mask)} entries, but actions have {actions.shape[-1]} dimensions "
            f"and the state has {state.shape[-1]}"
        )
    moved = np.array(actions)
    moved[..., : len(mask)] += sign * np.where(mask, state[..., : len(mask)], 0)
    return moved


def _to_json(statistics: Statistics) -> dict[str, Any]:
    entries = {f.name: getattr(statistics, f.name) for f in fields(statistics)}
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in entries.items()}


def _from_json(tree: Any, where: str) -> Statistics:
    if isinstance(tree, Statistics):
        return tree
    named = {_FIELDS.get(k, k): v for k, v in tree.items()}
    arrays = {k: np.asarray(named[k], np.float64) for k in _ARRAYS if named.get(k) is not None}
    sizes = {k: v.shape for k, v in arrays.items()}
    if not {"mean", "std"} <= set(sizes) or len(set(sizes.values())) != 1:
        raise ValueError(f"{where}: expected mean, std and others of one length, got {sizes}")
    return Statistics(**arrays, count=int(named.get("count") or 0))


def _is(value: Any) -> bool:
    return isinstance(value, Statistics) or (isinstance(value, Mapping) and "mean" in value)


def _has_groups(tree: Any) -> bool:
    return isinstance(tree, Mapping) and any(_is(value) for value in tree.values())
