"""Robot units to what the model sees, and back, from statistics of the data.

The arithmetic follows openpi's and Octo's formulas literally, so that `min_scale=0` and the right
epsilon give their numbers to the last bits even where a dimension hardly moves.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pizero.data.stats import Statistics

KINDS = {
    "z_score": ("mean", "std"),
    "quantile": ("q01", "q99"),
    "min_max": ("min", "max"),
    "identity": (),
}
_RULE = ("kind", "mask", "bounds", "clip", "epsilon", "inverse_epsilon", "min_scale")


class Normalizer:
    """Maps robot units to what the model sees, and back; arrays [... d].

    z_score     (x - mean) / (std + epsilon)
    quantile    2 (x - q01) / (q99 - q01 + epsilon) - 1
    min_max     2 (x - min) / (max - min + epsilon) - 1
    identity    x

    `bounds` are what the two quantiles (or min and max) become: -1 and 1, or for policies trained
    so 0 and 1. `mask` False leaves a dimension as it is (grippers). A dimension whose spread (std,
    or the range) is below `min_scale` is constant for our purposes: it is only centred, not
    divided, so noise in it cannot blow up; with `min_scale=0` the formula applies regardless, as in
    openpi. `clip` bounds the normalised values on the way in. `inverse_epsilon` is the epsilon on
    the way out where it differs (open-pi-zero has none there).

    `size` is the width of the data where that of the statistics differs, as openpi has it: surplus
    statistics are cut; surplus dimensions have mean 0 and std 1 (z_score) or are left alone.
    """

    def __init__(
        self,
        *,
        kind: str,
        statistics: Statistics,
        mask: Sequence[bool] | None = None,
        bounds: Sequence[float] = (-1.0, 1.0),
        clip: float | None = None,
        epsilon: float = 1e-6,
        inverse_epsilon: float | None = None,
        min_scale: float = 1e-4,
        size: int | None = None,
    ) -> None:
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"expected normalization {', '.join(KINDS)}, got {kind!r}{hint}")
        missing = [name for name in KINDS[kind] if getattr(statistics, name) is None]
        if missing:
            raise ValueError(f"{kind} normalization needs {missing}, which the statistics lack")
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(f"expected bounds [low, high] with low < high, got {list(bounds)}")
        self.kind, self.clip = kind, clip
        self.size = statistics.size if size is None else size
        if mask is None and statistics.mask is not None:
            mask = statistics.mask.tolist()
        if mask is not None and len(mask) != self.size:
            raise ValueError(f"mask has {len(mask)} entries, statistics {self.size} dimensions")
        if inverse_epsilon is None:
            inverse_epsilon = epsilon
        self._in = _Formula(kind, statistics, self.size, mask, bounds, epsilon, min_scale)
        self._out = _Formula(kind, statistics, self.size, mask, bounds, inverse_epsilon, min_scale)

    @property
    def scale(self) -> np.ndarray:
        """Robot units per model unit [size]."""
        return self._in.scale / self._in.gain

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Robot units to model units."""
        f = self._in
        y = (self._checked(x) - f.start) / f.scale * f.gain + f.offset
        return y if self.clip is None else np.clip(y, -self.clip, self.clip)

    def denormalize(self, y: np.ndarray) -> np.ndarray:
        """Model units to robot units."""
        f = self._out
        return (self._checked(y) - f.offset) / f.gain * f.scale + f.start

    def _checked(self, x: np.ndarray) -> np.ndarray:
        if x.shape[-1] != self.size:
            raise ValueError(
                f"expected {self.size} dimensions as in the statistics, got values of shape "
                f"{list(x.shape)}"
            )
        return x


def make_normalizer(
    name: str,
    rule: str | Mapping[str, Any],
    statistics: Mapping[str, Statistics],
    width: int | None,
) -> Normalizer:
    """The Normalizer of `name` from a kind or from its arguments; `width` cuts the statistics."""
    if name not in statistics:
        raise ValueError(f"expected statistics of {name!r}, got only {sorted(statistics)}")
    rule = {"kind": rule} if isinstance(rule, str) else rule
    for key in rule:
        expect_one_of(f"a key of normalization.{name}", key, _RULE)
    if "kind" not in rule:
        raise ValueError(f"expected a kind in the normalization of {name!r}, got {sorted(rule)}")
    try:
        chosen = statistics[name] if width is None else statistics[name].cut(width)
        return Normalizer(statistics=chosen, **rule)
    except ValueError as error:
        raise ValueError(f"normalization of {name!r}: {error}") from error


def expect_one_of(what: str, got: str, known: Sequence[str]) -> None:
    """Refuse a word that is not known, with the nearest one that is."""
    if got not in known:
        near = difflib.get_close_matches(got, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected {what} to be one of {', '.join(known)}, got {got!r}{hint}")


class _Formula:
    """y = (x - start) / scale * gain + offset, per dimension [size]."""

    def __init__(
        self,
        kind: str,
        statistics: Statistics,
        size: int,
        mask: Sequence[bool] | None,
        bounds: Sequence[float],
        epsilon: float,
        min_scale: float,
    ) -> None:
        self.start, self.offset = np.zeros(size), np.zeros(size)
        self.scale, self.gain = np.ones(size), np.ones(size)
        if kind == "identity":
            return
        first, second = (getattr(statistics, name)[:size] for name in KINDS[kind])
        n = len(first)
        if kind == "z_score":
            center, spread = first, second
            self.scale = np.ones(size) + epsilon  # where there are no statistics, std is 1
            self.scale[:n], self.start[:n] = second + epsilon, first
        else:
            center, spread = (first + second) / 2, second - first
            self.scale[:n], self.start[:n] = spread + epsilon, first
            self.gain[:n], self.offset[:n] = bounds[1] - bounds[0], bounds[0]
        constant = np.flatnonzero(spread < min_scale)
        self.start[constant] = center[constant]
        if kind != "z_score":
            self.offset[constant] = (bounds[0] + bounds[1]) / 2
        self.scale[constant] = self.gain[constant] = 1.0
        if mask is not None:
            untouched = ~np.asarray(mask, bool)
            self.start[untouched] = self.offset[untouched] = 0.0
            self.scale[untouched] = self.gain[untouched] = 1.0


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
