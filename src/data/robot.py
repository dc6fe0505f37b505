"""A robot in one YAML: its cameras, state and actions, and how they become what a policy learns.

    config/robot/aloha.yaml -> Robot, which PolicyPipeline takes as `robot`

A robot's numbers come in up to three forms. The *data* form is what its data set holds. The
*policy* form is what is normalised and learnt; `state_maps` and `action_maps` lead there, and
actions come back by the inverse. The *live* form is what the running robot or simulator speaks
where that differs from its data (quaternions for Euler angles, pictures upside down); `live` leads
from there to the data form. Training sees data, acting sees live.

    live --live.state_maps--> data --state_maps--> policy          (states)
    live <--live.action_maps-- data <--inverse of action_maps-- policy   (actions)
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pizero.data.maps import InvertibleMap, Map

ROTATIONS = ("euler_xyz", "rotation_vector", "quaternion_xyzw", "quaternion_wxyz")


class OutputStage(Protocol):
    """Last step before the robot, on the actions that are really executed; remembers over calls."""

    def __call__(self, actions: np.ndarray) -> np.ndarray:
        """Actions [n A] in the order of execution, as the robot gets them."""
        ...

    def reset(self) -> None:
        """Forget; to be called when an episode begins."""
        ...


class GripperThreshold:
    """An opening in [0, 1] becomes one of two commands: `above` the threshold, or else `below`."""

    def __init__(
        self, *, dim: int, threshold: float = 0.5, below: float = -1.0, above: float = 1.0
    ) -> None:
        self.dim, self.threshold, self.below, self.above = dim, threshold, below, above

    def __call__(self, actions: np.ndarray) -> np.ndarray:
        actions = np.array(actions)
        is_above = actions[..., self.dim] > self.threshold
        actions[..., self.dim] = np.where(is_above, self.above, self.below)
        return actions

    def reset(self) -> None:
        """Nothing to forget."""


class GripperLatch:
    """An opening in [0, 1] becomes a relative command (+1 closes) that sticks for some steps.

    The command is 1 - 2 x. One beyond `threshold` either way is repeated for `steps` steps, its own
    among them, whatever comes meanwhile: a slow gripper needs that long to close.
    """

    def __init__(self, *, dim: int, threshold: float = 0.5, steps: int = 15) -> None:
        if steps < 1:
            raise ValueError(f"expected steps >= 1, got {steps}")
        self.dim, self.threshold, self.steps = dim, threshold, steps
        self.reset()

    def __call__(self, actions: np.ndarray) -> np.ndarray:
        if actions.ndim != 2:
            raise ValueError(f"expected executed actions [n A], got shape {list(actions.shape)}")
        actions = np.array(actions)
        for action in actions:
            command = 1 - 2 * action[self.dim]
            if not self._left and abs(command) > self.threshold:
                self._left, self._held = self.steps, command
            if self._left:
                self._left, command = self._left - 1, self._held
            action[self.dim] = command
        return actions

    def reset(self) -> None:
        """Let go."""
        self._left, self._held = 0, 0.0


class Live:
    """Where the running robot or simulator differs from its data.

    state           its parts and their widths, in order; None: as in the data
    state_maps      live state -> state of the data
    action_maps     actions of the data -> live actions
    rotate_images   degrees counter-clockwise, a multiple of 90
    """

    def __init__(
        self,
        *,
        state: Mapping[str, int] | None = None,
        state_maps: Sequence[Map] = (),
        action_maps: Sequence[Map] = (),
        rotate_images: int = 0,
    ) -> None:
        if rotate_images % 90:
            raise ValueError(f"expected rotate_images to be a multiple of 90, got {rotate_images}")
        self.state = None if state is None else dict(state)
        self.state_maps, self.action_maps = tuple(state_maps), tuple(action_maps)
        self.rotate_images = rotate_images


class Robot:
    """What is special about one robot.

    name            for messages
    cameras         the policy's camera -> the robot's name for it, several such names, or None for
                    one that the robot lacks
    ignored_cameras names of further cameras that it may send
    state           its parts and the names of their entries; parts are joined in this order
    action          names of an action's entries
    units           pattern of names (`*_joint`) -> unit, for people
    rotation        form of rotations in the data, one of ROTATIONS, None: none are there
    control_hz      actions per second
    horizon, replan actions a policy of this robot predicts, and those executed before it looks
                    again, where published policies agree
    state_maps, action_maps   data form -> policy form; those of actions can be undone
    delta_mask      leading dimensions of actions that are learned relative to the state
    image_size      (height, width) of its pictures; resize: how they are fitted to the model
    normalization   as PolicyPipeline's, where it belongs to the robot rather than to the model
    statistics      file or published name, likewise; dataset: which one of a file with several
    default_text    instruction when none is given
    live, output    see Live and OutputStage; `output_stage` gives a fresh copy for an episode
    """

    def __init__(
        self,
        *,
        name: str,
        cameras: Mapping[str, str | Sequence[str] | None],
        state: Mapping[str, Sequence[str]],
        action: Sequence[str],
        units: Mapping[str, str],
        rotation: str | None,
        control_hz: float,
        horizon: int,
        replan: int,
        resize: str,
        image_size: Sequence[int] | None = None,
        ignored_cameras: Sequence[str] = (),
        state_maps: Sequence[Map] = (),
        action_maps: Sequence[InvertibleMap] = (),
        delta_mask: Sequence[bool] | None = None,
        normalization: Mapping[str, str | Mapping[str, Any]] | None = None,
        statistics: str | Path | None = None,
        dataset: str | None = None,
        default_text: str | None = None,
        live: Live | None = None,
        output: OutputStage | None = None,
    ) -> None:
        self.name, self.rotation, self.units = name, rotation, dict(units)
        self.control_hz, self.horizon, self.replan = control_hz, horizon, replan
        self.image_size = None if image_size is None else (image_size[0], image_size[1])
        self.resize, self.normalization, self.default_text = resize, normalization, default_text
        self.statistics, self.dataset = statistics, dataset
        self.cameras = {slot: _several(names) for slot, names in cameras.items()}
        self.ignored_cameras = frozenset(ignored_cameras)
        self.state_parts = {part: tuple(names) for part, names in state.items()}
        self.action_names = tuple(action)
        self.state_maps, self.action_maps = tuple(state_maps), tuple(action_maps)
        self.delta_mask = tuple(delta_mask) if delta_mask else None
        self.live = Live() if live is None else live
        self._output = output
        self._check()

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the entries of the state, parts joined."""
        return tuple(name for names in self.state_parts.values() for name in names)

    @property
    def state_dim(self) -> int:
        """Entries of the state in the data and for the policy."""
        return len(self.state_names)

    @property
    def action_dim(self) -> int:
        """Entries of an action."""
        return len(self.action_names)

    @property
    def live_state_dim(self) -> int:
        """Entries of the state that the running robot sends."""
        return sum(self._parts(live=True).values())

    def output_stage(self) -> OutputStage | None:
        """A stage of its own for one run of actions, reset; None if the robot needs none."""
        stage = copy.deepcopy(self._output)
        if stage is not None:
            stage.reset()
        return stage

    def rename_images(
        self, images: Mapping[str, np.ndarray], *, live: bool
    ) -> dict[str, np.ndarray]:
        """Pictures under the policy's names of cameras; HWC, live ones the right way up.

        Both the policy's and the robot's names are understood; unknown ones are refused.
        """
        slots = {name: slot for slot, names in self.cameras.items() for name in (*names, slot)}
        renamed: dict[str, np.ndarray] = {}
        for name, image in images.items():
            if name in self.ignored_cameras:
                continue
            if name not in slots:
                near = difflib.get_close_matches(name, slots, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"robot {self.name!r} has cameras {', '.join(slots)}, got {name!r}{hint}"
                )
            if slots[name] in renamed:
                raise ValueError(f"two pictures for camera {slots[name]!r}, {name!r} is one")
            turns = self.live.rotate_images // 90 if live else 0
            renamed[slots[name]] = np.rot90(image, turns, axes=(-3, -2)) if turns else image
        return renamed

    def data_state(self, state: np.ndarray | Mapping[str, np.ndarray], *, live: bool) -> np.ndarray:
        """The state [... S] as the data has it, from its parts or from one array."""
        parts = self._parts(live)
        joined = _join(state, parts) if isinstance(state, Mapping) else np.asarray(state)
        if joined.ndim == 0 or joined.shape[-1] != sum(parts.values()):
            form = "live state" if live else "state"
            raise ValueError(
                f"robot {self.name!r}: expected a {form} of {sum(parts.values())} entries "
                f"({', '.join(f'{k} {v}' for k, v in parts.items())}), got shape "
                f"{list(joined.shape)}"
            )
        return _apply(self.live.state_maps, joined) if live else joined

    def encode_state(self, state: np.ndarray) -> np.ndarray:
        """State of the data [... S] as the policy learns it."""
        return _apply(self.state_maps, state)

    def encode_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions of the data [... A] as the policy learns them."""
        return _apply(self.action_maps, actions)

    def decode_actions(self, actions: np.ndarray, *, live: bool) -> np.ndarray:
        """The policy's actions [... A] as the running robot takes them, or as its data has them."""
        for step in reversed(self.action_maps):
            actions = step.inverse(actions)
        return _apply(self.live.action_maps, actions) if live else actions

    def _parts(self, live: bool) -> dict[str, int]:
        if live and self.live.state is not None:
            return self.live.state
        return {part: len(names) for part, names in self.state_parts.items()}

    def _check(self) -> None:
        """Everything that can be wrong in a YAML, before any picture comes."""
        where = f"robot {self.name!r}"
        if not self.cameras:
            raise ValueError(f"{where}: expected at least one camera")
        robots = [name for names in self.cameras.values() for name in names]
        if twice := {name for name in robots if robots.count(name) > 1}:
            raise ValueError(f"{where}: cameras {sorted(twice)} are named twice")
        for kind, names in (("state", self.state_names), ("action", self.action_names)):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{where}: expected distinct {kind} names, got {list(names)}")
        names = {*self.state_names, *self.action_names}
        for pattern in self.units:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{where}: units of {pattern!r}, but no entry is called so")
        if bare := [n for n in sorted(names) if not any(fnmatchcase(n, p) for p in self.units)]:
            raise ValueError(f"{where}: expected units of all entries, {bare} have none")
        if self.rotation is not None and self.rotation not in ROTATIONS:
            raise ValueError(
                f"{where}: expected a rotation of {', '.join(ROTATIONS)}, got {self.rotation!r}"
            )
        if self.control_hz <= 0 or not 1 <= self.replan <= self.horizon:
            raise ValueError(
                f"{where}: expected control_hz > 0 and 1 <= replan <= horizon, got "
                f"{self.control_hz}, {self.replan} and {self.horizon}"
            )
        narrower = min(self.state_dim, self.action_dim)
        if self.delta_mask is not None and len(self.delta_mask) > narrower:
            raise ValueError(
                f"{where}: delta_mask has {len(self.delta_mask)} entries, states have "
                f"{self.state_dim} and actions {self.action_dim}"
            )
        for step in self.action_maps:
            if not isinstance(step, InvertibleMap):
                raise ValueError(f"{where}: action map {type(step).__name__} has no way back")
        states, actions, live = self.state_dim, self.action_dim, self.live
        for field, maps, width, expected in (
            ("state_maps", self.state_maps, states, states),
            ("action_maps", self.action_maps, actions, actions),
            ("live.state_maps", live.state_maps, self.live_state_dim, states),
            ("live.action_maps", live.action_maps, actions, None),
        ):
            self._try(field, maps, width, expected)

    def _try(self, field: str, maps: Sequence[Map], width: int, expected: int | None) -> None:
        """Run maps on some values: dimensions must exist, and as many come out as are named."""
        try:
            got = _apply(maps, np.full(width, 0.5)).shape[-1]
        except IndexError as error:
            raise ValueError(f"robot {self.name!r}: {field} of {width} entries: {error}") from error
        if expected is not None and got != expected:
            raise ValueError(
                f"robot {self.name!r}: {field} give {got} entries, but {expected} are named"
            )


def _several(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _apply(maps: Iterable[Map], x: np.ndarray) -> np.ndarray:
    for step in maps:
        x = step(x)
    return x


def _join(state: Mapping[str, np.ndarray], parts: Mapping[str, int]) -> np.ndarray:
    """Parts [... d] joined; a part of one entry may lack its axis."""
    if set(state) != set(parts):
        raise ValueError(f"expected a state of {', '.join(parts)}, got {', '.join(state)}")
    arrays = []
    for part, width in parts.items():
        values = np.asarray(state[part])
        if width == 1 and (values.ndim == 0 or values.shape[-1] != 1):
            values = values[..., None]
        if values.shape[-1:] != (width,):
            raise ValueError(f"expected {part} of {width} entries, got shape {list(values.shape)}")
        arrays.append(values)
    return np.concatenate(arrays, axis=-1)
