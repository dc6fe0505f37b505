"""Small maps between the numbers a robot speaks and those its policy learns, named in robot YAMLs.

A map is called with values [... d] and returns values [... e]; one with `inverse` also goes back.
Each works on the dimensions it is given and leaves the others alone.

    maps:
      - {_target_: pizero.data.maps.Affine, dims: [1, 2, 8, 9], scale: -1.0}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Map(Protocol):
    """Any callable on values [... d]."""

    def __call__(self, x: np.ndarray) -> np.ndarray: ...


@runtime_checkable
class InvertibleMap(Map, Protocol):
    """A map that can be undone."""

    def inverse(self, y: np.ndarray) -> np.ndarray: ...


class Affine:
    """x * scale + offset: flips of sign, changes of unit, 1 - x."""

    def __init__(self, *, dims: Sequence[int], scale: float = 1.0, offset: float = 0.0) -> None:
        if scale == 0:
            raise ValueError("expected a scale that can be undone, got 0")
        self.dims, self.scale, self.offset = list(dims), scale, offset

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return _put(x, self.dims, x[..., self.dims] * self.scale + self.offset)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        return _put(y, self.dims, (y[..., self.dims] - self.offset) / self.scale)


class Interval:
    """Takes the interval `source` to the interval `target`, and values outside accordingly."""

    def __init__(
        self, *, dims: Sequence[int], source: Sequence[float], target: Sequence[float]
    ) -> None:
        for name, pair in (("source", source), ("target", target)):
            if len(pair) != 2 or pair[0] == pair[1]:
                raise ValueError(f"expected {name} [from, to], two values, got {list(pair)}")
        self.dims, self.source, self.target = list(dims), tuple(source), tuple(target)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return _put(x, self.dims, _between(x[..., self.dims], self.source, self.target))

    def inverse(self, y: np.ndarray) -> np.ndarray:
        return _put(y, self.dims, _between(y[..., self.dims], self.target, self.source))


class Reorder:
    """Entry i of the result is entry `order[i]`; every dimension occurs once."""

    def __init__(self, *, order: Sequence[int]) -> None:
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"expected every dimension once in order, got {list(order)}")
        self.order = list(order)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return _exactly(x, len(self.order))[..., self.order]

    def inverse(self, y: np.ndarray) -> np.ndarray:
        return _exactly(y, len(self.order))[..., np.argsort(self.order)]


class CrankAngle:
    """Opening of a gripper that a crank drives (metres) to the crank's angle (radians).

    `radius` is the crank's, `length` that of the arm between it and the finger; openings that the
    linkage cannot reach get the nearest angle it can.
    """

    def __init__(self, *, dims: Sequence[int], radius: float, length: float) -> None:
        self.dims, self.radius, self.length = list(dims), radius, length

    def __call__(self, x: np.ndarray) -> np.ndarray:
        opening = x[..., self.dims]
        sine = (self.radius**2 + opening**2 - self.length**2) / (2 * self.radius * opening)
        return _put(x, self.dims, np.arcsin(np.clip(sine, -1.0, 1.0)))


class QuaternionToEuler:
    """A quaternion at `start` to roll, pitch, yaw about fixed axes (x first); 4 entries to 3.

    `relative_to` is a rotation matrix R0: the angles are then those of R R0^T, R being the
    quaternion's.
    """

    def __init__(
        self,
        *,
        start: int,
        order: str,
        relative_to: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.start, self.order = start, _quaternion_order(order)
        self.origin = np.eye(3) if relative_to is None else np.array(relative_to, np.float64)
        if self.origin.shape != (3, 3) or not np.allclose(self.origin @ self.origin.T, np.eye(3)):
            raise ValueError(f"expected a rotation matrix [3 3], got {self.origin.tolist()}")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        quaternion = _wxyz(x, self.start, self.order)
        angles = _euler(_matrix(quaternion) @ self.origin.T)
        return np.concatenate([x[..., : self.start], angles, x[..., self.start + 4 :]], axis=-1)


class QuaternionToRotationVector:
    """A quaternion at `start` to axis times angle; 4 entries to 3."""

    def __init__(self, *, start: int, order: str) -> None:
        self.start, self.order = start, _quaternion_order(order)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        vector = _rotation_vector(_wxyz(x, self.start, self.order))
        return np.concatenate([x[..., : self.start], vector, x[..., self.start + 4 :]], axis=-1)


class EulerToRotationVector:
    """Roll, pitch, yaw about fixed axes (x first) at `start` to axis times angle."""

    def __init__(self, *, start: int) -> None:
        self.start = start

    def __call__(self, x: np.ndarray) -> np.ndarray:
        dims = list(range(self.start, self.start + 3))
        return _put(x, dims, _rotation_vector(_quaternion(x[..., dims])))


def _put(x: np.ndarray, dims: list[int], values: np.ndarray) -> np.ndarray:
    changed = np.array(x, np.result_type(x, values))
    changed[..., dims] = values
    return changed


def _between(x: np.ndarray, source: tuple, target: tuple) -> np.ndarray:
    share = (x - source[0]) / (source[1] - source[0])
    return share * (target[1] - target[0]) + target[0]


def _exactly(x: np.ndarray, size: int) -> np.ndarray:
    if x.shape[-1] != size:
        raise ValueError(f"expected {size} dimensions to reorder, got shape {list(x.shape)}")
    return x


def _quaternion_order(order: str) -> list[int]:
    if order not in ("wxyz", "xyzw"):
        raise ValueError(f"expected the quaternion's order to be wxyz or xyzw, got {order!r}")
    return [order.index(axis) for axis in "wxyz"]


def _wxyz(x: np.ndarray, start: int, order: list[int]) -> np.ndarray:
    """float64 [... 4] of unit length; zeros are a mistake that would pass unnoticed."""
    quaternion = np.asarray(x[..., start : start + 4], np.float64)[..., order]
    length = np.linalg.norm(quaternion, axis=-1, keepdims=True)
    if not (length > 1e-6).all():
        raise ValueError(f"expected a quaternion at {start}:{start + 4}, got {quaternion.tolist()}")
    return quaternion / length


def _matrix(quaternion: np.ndarray) -> np.ndarray:
    w, x, y, z = np.moveaxis(quaternion, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _euler(m: np.ndarray) -> np.ndarray:
    """Angles of R = Rz(yaw) Ry(pitch) Rx(roll); yaw is 0 where pitch is straight up or down."""
    cosine = np.hypot(m[..., 0, 0], m[..., 1, 0])
    locked = cosine < 1e-12
    roll = np.where(
        locked,
        np.arctan2(-m[..., 1, 2], m[..., 1, 1]),
        np.arctan2(m[..., 2, 1], m[..., 2, 2]),
    )
    pitch = np.arctan2(-m[..., 2, 0], cosine)
    yaw = np.where(locked, 0.0, np.arctan2(m[..., 1, 0], m[..., 0, 0]))
    return np.stack([roll, pitch, yaw], axis=-1)


def _quaternion(euler: np.ndarray) -> np.ndarray:
    """wxyz of Rz(yaw) Ry(pitch) Rx(roll)."""
    half = np.asarray(euler, np.float64) / 2
    (cr, cp, cy), (sr, sp, sy) = (np.moveaxis(f(half), -1, 0) for f in (np.cos, np.sin))
    return np.stack(
        [
            cr * cp * cy + sr * sp * sy,
            sr * cp * cy - cr * sp * sy,
            cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy,
        ],
        axis=-1,
    )


def _rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle in [0, 2 pi): the sign of w is kept, as simulators do."""
    w, vector = quaternion[..., :1], quaternion[..., 1:]
    sine = np.linalg.norm(vector, axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, w)
    tiny = sine < 1e-12
    return np.where(tiny, 0.0, vector * angle / np.where(tiny, 1.0, sine))
