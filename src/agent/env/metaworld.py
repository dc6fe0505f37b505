"""Metaworld (version 3) behind the four methods of a simulator: a Sawyer arm and a table.

Control runs at 20 Hz: an action (hand motion xyz in units of 1 cm per simulator step, gripper;
all in [-1, 1], + closes) is held for 4 simulator steps of 80 Hz. A control step succeeds if the
task's own test holds after the last of its 4 simulator steps. Metaworld's test is not sticky, so
success can come and go: `run` reports every step, and the rules "at the end" and "at any time" are
both the caller's to apply. The state is the hand's position (m) and the gripper's opening (0..1).

Physics, tasks and success tests are Metaworld's. What the eye sees is ours: camera poses, a grey
arm (Metaworld's is as red as the button and the faucet), a bright puck, goal markers where the goal
is a point in space and nowhere else, and no robot parts that only the far side of the room shows.

faucet-open and faucet-close are one scene: same starts, no markers, so only the words say which.
`goals` then tells of both goals, whatever the episode's task is. Elsewhere it has the task's own.

Starts are reproducible bit for bit: (pool, start) seeds the scene's random vector by a hash, and
the environment class is used directly (through gymnasium.make the goal would come from another
generator and differ from run to run).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from pizero.agent.env.base import unknown_name
from pizero.agent.env.metaworld_experts import expert_for
from pizero.agent.env.metaworld_tasks import TASKS, TaskSpec
from pizero.agent.env.rendering import (
    Painter,
    cameras_from,
    choose_gl,
    load_mujoco,
    place_camera,
)

POOLS = ("demo", "eval")
HOLD = 4  # simulator steps per control step: 80 Hz / 4 = 20 Hz
_SLOTS = ("corner", "corner2", "corner3", "corner4", "topview")  # world cameras free to be moved
_HAND_SLOTS = ("gripperPOV", "behindGripper")
_UNSEEN = 5  # a geom group that MuJoCo does not draw
_BEHIND = {
    "controller_box",
    "head",
    "pedestal",
    "pedestal_feet",
    "right_arm_base_link",
    "right_l0",
    "right_l1",
    "right_l1_2",
    "right_l2",
    "screen",
    "torso",
}
_ARM_RGBA = (0.30, 0.32, 0.36, 1.0)
_PUCK_RGBA = (1.0, 0.85, 0.0, 1.0)
_MARKER_RADIUS = 0.025


class MetaworldSimulator:
    """See base.Simulator for the methods.

    `cameras` are {name: {position, target, fovy, on_hand}}; pictures are `image_size` square, drawn
    `supersample` times larger. Film frames show the first camera at `film_size`.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        cameras: Mapping[str, Mapping[str, Any]],
        image_size: int,
        supersample: int,
        film_size: int,
        max_steps: int,
    ) -> None:
        for task in tasks:
            if task not in TASKS:
                raise unknown_name("task", task, TASKS)
        if not 1 <= max_steps <= 100:
            raise ValueError(
                f"max_steps must be 1..100 (Metaworld ends at 500 / {HOLD}), got {max_steps}"
            )
        self._cameras = cameras_from(cameras)
        if not self._cameras:
            raise ValueError("at least one camera is needed")
        for slots, on_hand in ((_SLOTS, False), (_HAND_SLOTS, True)):
            count = sum(camera.on_hand == on_hand for camera in self._cameras.values())
            if count > len(slots):
                where = "on the hand" if on_hand else "in the room"
                raise ValueError(f"at most {len(slots)} cameras can be {where}, got {count}")
        self._tasks = list(tasks)
        self._image_size = image_size
        self._supersample = supersample
        self._film_size = film_size
        self._max_steps = max_steps
        self._scenes: dict[str, _Scene] = {}
        self._scene: _Scene | None = None
        self._text = ""
        choose_gl()

    def describe(self) -> dict[str, Any]:
        return {
            "tasks": {
                name: {"sentences": list(TASKS[name].sentences), "group": TASKS[name].scene}
                for name in self._tasks
            },
            "cameras": list(self._cameras),
            "state_dim": 4,
            "action_dim": 4,
            "control_hz": 80.0 / HOLD,
            "max_steps": self._max_steps,
            "version": _version(),
        }

    def reset(
        self, *, task: str, start: int, pool: str = "demo", text: str | None = None
    ) -> dict[str, Any]:
        scene = self._begin(task, start, pool, text)
        return self._observe(scene)

    def run(self, *, actions: np.ndarray, film: bool = False) -> dict[str, Any]:
        if self._scene is None:
            raise ValueError("reset comes before run")
        scene = self._scene
        actions = np.asarray(actions, dtype=np.float64)
        if actions.ndim != 2 or actions.shape[1] != 4:
            raise ValueError(f"actions must be [n, 4], got {list(actions.shape)}")
        if not np.isfinite(actions).all():
            raise ValueError("actions must be finite numbers")
        left = self._max_steps - scene.steps
        if left <= 0:
            raise ValueError(
                f"the episode is over after {self._max_steps} control steps: reset first"
            )
        success, goals, frames = [], [], []
        for action in actions[:left]:
            success.append(scene.step(action))
            goals.append(scene.goals())
            if film:
                frames.append(scene.draw(next(iter(self._cameras)), self._film_size, 2))
        return {
            "observation": self._observe(scene),
            "success": np.array(success, dtype=bool),
            "goals": {
                name: np.array([reached[name] for reached in goals], dtype=bool)
                for name in scene.goals()
            },
            "steps": scene.steps,
            "done": scene.steps >= self._max_steps,
            "film": frames,
        }

    def demonstrate(
        self,
        *,
        task: str,
        start: int,
        pool: str = "demo",
        noise: float = 0.0,
        displace: bool = False,
        hold: int = 0,
        text: str | None = None,
    ) -> dict[str, Any]:
        """Record the expert.

        `noise` is the standard deviation of what is added to the executed motion, drawn anew over
        random spans of 1-4 steps; it fades near contact, where a shove ruins an episode but teaches
        nothing. The recorded action is the expert's own for the state seen, so the noise makes the
        recording cover states beside the path together with the way back. `displace` starts from a
        hand moved aside by up to 8 cm. After the first success `hold` further steps are recorded,
        which show how to stay; the episode counts if it still succeeds at the end of them.
        """
        scene = self._begin(task, start, pool, text)
        expert = expert_for(task)
        random = np.random.default_rng(_seed("perturbation", pool, task, str(start)))
        if displace:
            scene.displace(random)
        images: dict[str, list[np.ndarray]] = {name: [] for name in self._cameras}
        states, labels = [], []
        success, remaining, span, push = False, hold, 0, np.zeros(3)
        while scene.steps < self._max_steps:
            label, calm = expert(scene.observation)
            for name, pictures in self._observe(scene)["images"].items():
                images[name].append(pictures)
            states.append(scene.state())
            labels.append(label)
            if span == 0:
                span, push = int(random.integers(1, 5)), random.normal(size=3)
            span -= 1
            executed = label.copy()
            executed[:3] += noise * calm * push
            success = scene.step(np.clip(executed, -1.0, 1.0))
            if success or remaining < hold:
                remaining -= 1
                if remaining < 0:
                    break
        return {
            "success": success,
            "text": self._text,
            "steps": {
                "images": {name: np.stack(pictures) for name, pictures in images.items()},
                "state": np.stack(states),
                "action": np.stack(labels).astype(np.float32),
            },
        }

    def _begin(self, task: str, start: int, pool: str, text: str | None) -> _Scene:
        if task not in self._tasks:
            raise unknown_name("task", task, self._tasks)
        if pool not in POOLS:
            raise unknown_name("pool", pool, POOLS)
        if start < 0:
            raise ValueError(f"start must be 0 or more, got {start}")
        if task not in self._scenes:
            size = max(self._image_size * self._supersample, self._film_size * 2)
            self._scenes[task] = _Scene(TASKS[task], self._cameras, size)
        scene = self._scene = self._scenes[task]
        scene.reset(pool, start)
        sentences = TASKS[task].sentences
        chosen = int(
            np.random.default_rng(_seed("text", pool, task, str(start))).integers(len(sentences))
        )
        self._text = sentences[chosen] if text is None else text
        return scene

    def _observe(self, scene: _Scene) -> dict[str, Any]:
        return {
            "images": {
                name: scene.draw(name, self._image_size, self._supersample)
                for name in self._cameras
            },
            "state": scene.state(),
            "text": self._text,
        }


class _Scene:
    """One Metaworld environment: its starts, its control steps and its pictures."""

    def __init__(self, task: TaskSpec, cameras: Mapping[str, Any], picture_size: int) -> None:
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        except ImportError as error:
            raise _not_installed(error) from error
        self.task = task
        self.steps = 0
        self._env: Any = ALL_V3_ENVIRONMENTS[f"{task.name}-v3"]()
        # The experts read the goal from the observation; the cached space would hide it.
        self._env._partially_observable = False
        self._env.__dict__.pop("sawyer_observation_space", None)
        self._env._set_task_called = True
        self._env._freeze_rand_vec = True
        self._dress()
        self.reset("demo", 0)
        self._slots = self._place(cameras)
        self._painter = Painter(self._env.model, max_size=picture_size)

    def reset(self, pool: str, start: int) -> None:
        self._env._last_rand_vec = self._start_vector(pool, start)
        self._env.reset()
        # Metaworld moves the scene's bodies last and mostly does not work out where that puts them:
        # the first observation and picture would show the previous episode's scene.
        load_mujoco().mj_forward(self._env.model, self._env.data)
        self._env.data.qacc_warmstart[:] = 0.0
        self._env._prev_obs = self._env._get_curr_obs_combined_no_goal()
        self.observation = self._env._get_obs()
        self.steps = 0
        self._info_success = False

    def step(self, action: np.ndarray) -> bool:
        """One control step; whether the task's test holds after it."""
        action = np.clip(action, -1.0, 1.0).astype(np.float32)
        info = {}
        for _ in range(HOLD):
            self.observation, _, _, _, info = self._env.step(action)
        self.steps += 1
        self._info_success = bool(info["success"])
        return self._info_success

    def goals(self) -> dict[str, bool]:
        """Which goals are reached now: in the faucet's scene both, by Metaworld's own tests."""
        if self.task.group != "faucet":
            return {self.task.name: self._info_success}
        base = self._env.model.body("faucetBase").pos
        # Where the handle's end is, seen from where it should be.
        missing = {
            "faucet-open": np.add(self._env.data.site("handleStartOpen").xpos, (-0.04, 0.0, 0.02))
            - np.add(base, (0.175, 0.0, 0.125)),
            "faucet-close": np.add(self._env.data.site("handleStartClose").xpos, (0.0, 0.0, -0.01))
            - np.add(base, (-0.175, 0.0, 0.125)),
        }
        return {goal: bool(np.linalg.norm(offset) <= 0.07) for goal, offset in missing.items()}

    def state(self) -> np.ndarray:
        return self.observation[:4].astype(np.float32)

    def draw(self, camera: str, size: int, supersample: int) -> np.ndarray:
        return self._painter.draw(self._env.data, self._slots[camera], size, supersample)

    def displace(self, random: np.random.Generator) -> None:
        """Move the hand aside before the episode begins; it costs none of the episode's steps."""
        offset = random.uniform((-0.08, -0.08, -0.04), (0.08, 0.08, 0.08))
        target = self.observation[:3] + offset
        for _ in range(6):
            motion = np.clip((target - self.observation[:3]) * 15.0, -1.0, 1.0)
            self.step(np.append(motion, -1.0))
        self.steps = 0

    def _start_vector(self, pool: str, start: int) -> np.ndarray:
        """The scene's random vector. Where it holds an object and a goal, they keep 15 cm apart, as
        Metaworld wants it (it would draw again for ever from a frozen vector that does not)."""
        low, high = (x.astype(np.float64) for x in _bounds(self._env))
        if self.task.span_x is not None:
            low[0], high[0] = -self.task.span_x, self.task.span_x
        random = np.random.default_rng(_seed("start", pool, self.task.scene, str(start)))
        while True:
            vector = random.uniform(low, high)
            if vector.size != 6 or np.linalg.norm(vector[:2] - vector[3:5]) >= 0.15:
                return vector

    def _dress(self) -> None:
        """The scene's looks (see the module's docstring). Nothing here touches physics."""
        model = self._env.model
        for index in range(model.ngeom):
            body = model.body(model.geom_bodyid[index]).name
            if body in _BEHIND:
                model.geom_group[index] = _UNSEEN
            elif (body.startswith("right_l") or body == "right_hand") and model.geom_rgba[
                index, 3
            ] > 0:
                model.geom_rgba[index] = _ARM_RGBA
        for index in range(model.nsite):
            name = model.site(index).name
            if name == "goal" and self.task.marker:
                model.site_size[index] = _MARKER_RADIUS
            elif name.startswith("goal") or name in ("rightEndEffector", "leftEndEffector"):
                model.site_rgba[index, 3] = 0.0
        if self.task.marker:
            puck = model.geom("objGeom").id
            model.geom_matid[puck] = -1
            model.geom_rgba[puck] = _PUCK_RGBA

    def _place(self, cameras: Mapping[str, Any]) -> dict[str, str]:
        room, hand = iter(_SLOTS), iter(_HAND_SLOTS)
        slots = {name: next(hand if camera.on_hand else room) for name, camera in cameras.items()}
        model, data = self._env.model, self._env.data
        for name, camera in cameras.items():
            slot = slots[name]
            body = model.cam_bodyid[model.camera(slot).id]
            # The hand keeps its orientation (a mocap weld) up to a small lag, rounded off here.
            axes = np.round(data.xmat[body].reshape(3, 3)) if camera.on_hand else None
            place_camera(model, slot, camera, axes)
        return slots


def _version() -> str:
    try:
        return ", ".join(f"{name} {metadata.version(name)}" for name in ("metaworld", "mujoco"))
    except metadata.PackageNotFoundError as error:
        raise _not_installed(error) from error


def _not_installed(error: ImportError) -> ValueError:
    return ValueError(
        f"Metaworld is not installed in {sys.executable} ({error}): pip install 'pizero[metaworld]'"
    )


def _bounds(env: Any) -> tuple[np.ndarray, np.ndarray]:
    return env._random_reset_space.low, env._random_reset_space.high


def _seed(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:16], "little")
