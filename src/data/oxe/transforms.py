"""How each Open X-Embodiment set becomes states and actions of common conventions.

Most sets need no more than columns joined in another order with the gripper turned around: those
are rows of a table, which `join` reads. The others have a function. Actions of an end effector are
x, y, z, roll, pitch, yaw and a gripper that is 1 open, 0 closed.

`OCTO_RULES` are what Octo computes where that is not what the set's own description says; its
functions are the reference for all others (and OpenVLA's for the sets that only OpenVLA knows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from pizero.data.maps import QuaternionToEuler
from pizero.data.standardize import Episode, Rule, Standard

Change = Callable[[np.ndarray], np.ndarray]  # [T d] -> [T e]


@dataclass(frozen=True)
class Columns:
    """Entries of a key, sliced like an array and then changed: `Columns("action")[-1:]`.

    Values of any shape are taken as [T d], scalars as [T 1].
    """

    key: str
    start: int | None = None
    stop: int | None = None
    changes: tuple[Change, ...] = ()

    def __getitem__(self, part: slice) -> Columns:
        return Columns(self.key, part.start, part.stop)

    def then(self, *changes: Change) -> Columns:
        """These columns after further functions, in order."""
        return Columns(self.key, self.start, self.stop, self.changes + changes)

    def __call__(self, episode: Episode) -> np.ndarray:
        """float32 [T d]."""
        values = _table(episode, self.key)[:, self.start : self.stop]
        for change in self.changes:
            values = change(values)
        return values

    def __repr__(self) -> str:  # names what it does, and is the same in every process
        bounds = ["" if b is None else str(b) for b in (self.start, self.stop)]
        return " | ".join([f"{self.key}[{':'.join(bounds)}]", *(c.__name__ for c in self.changes)])


@dataclass(frozen=True)
class Fill:
    """Entries that a set does not have, all of one value."""

    value: float
    width: int = 1

    def __call__(self, episode: Episode) -> np.ndarray:
        """float32 [T width]."""
        steps = len(next(iter(episode.values())))
        return np.full((steps, self.width), self.value, np.float32)


Part = Columns | Fill


def join(episode: Episode, *, action: tuple[Part, ...], state: tuple[Part, ...]) -> Standard:
    """The rule of a set that needs no more than columns."""
    return Standard(_joined(episode, action), _joined(episode, state) if state else None)


def bridge(episode: Episode, *, drop_first: bool) -> Standard:
    """Movements to the pose that was reached, and a gripper without values in between.

    The last step has no next pose. OpenVLA leaves out the first too, whose action is all zeros.
    """
    first = 1 if drop_first else 0
    state = _table(episode, "observation/state")[first:]
    gripper = settled(_table(episode, "action")[first:, -1:])
    return _reached(state, gripper, first)


def bridge_0_1_0(episode: Episode) -> Standard:
    """The older copy of Bridge among the Open X-Embodiment sets, as OpenVLA has it."""
    gripper = _table(episode, "action/open_gripper")[1:]
    return _reached(_table(episode, "observation/state")[1:], gripper, 1)


def berkeley_rpt(episode: Episode) -> Standard:
    """30 Hz to 10 Hz: every third step, the change of joints to the next such step."""
    rows = np.arange(0, len(episode["action"]), 3)
    joints = _table(episode, "observation/joint_pos")[rows]
    gripper = _table(episode, "observation/gripper")[rows]
    action = np.concatenate(
        [np.diff(joints, axis=0), inverted(_table(episode, "action")[rows[:-1], -1:])], axis=1
    )
    return Standard(action, np.concatenate([joints, gripper], axis=1)[:-1], rows=rows[:-1])


def aloha(episode: Episode) -> Standard:
    """50 Hz to 10 Hz: every fifth step."""
    rows = np.arange(0, len(episode["action"]), 5)
    state = _table(episode, "observation/state")[rows]
    return Standard(_table(episode, "action")[rows], state, rows=rows)


def gnm(episode: Episode, *, is_octo: bool) -> Standard:
    """Every third step, the waypoint to the next such step in the frame of the robot.

    Waypoints are in units that differ between the robots; an action of the data and the distance it
    led tell how many to the metre. Octo asks the first step, which gives no number for a robot that
    stands still at first: here it is the first step that moves.
    """
    position = np.asarray(episode["observation/position"], np.float64)
    yaw = np.asarray(episode["observation/yaw"], np.float64).reshape(-1, 1)
    rows = np.arange(0, len(position), 3)[:-1]
    distance = np.linalg.norm(np.diff(position, axis=0), axis=1)
    moves = np.flatnonzero(distance > 1e-6)
    first = 0 if is_octo or not len(moves) else moves[0]
    move = position[rows + 3] - position[rows] if len(rows) else np.zeros((0, 2))
    cosine, sine = np.cos(yaw[rows]), np.sin(yaw[rows])
    action = np.concatenate(
        [cosine * move[:, :1] + sine * move[:, 1:], cosine * move[:, 1:] - sine * move[:, :1]],
        axis=1,
    )
    if len(rows) and (len(moves) or is_octo):
        length = np.linalg.norm(np.asarray(episode["action"][first], np.float64))
        with np.errstate(divide="ignore", invalid="ignore"):
            action = action * (length / distance[first])
    state = _table(episode, "observation/state")[rows]
    return Standard(action.astype(np.float32), state, rows=rows)


def language_table(episode: Episode) -> Standard:
    """A pusher on a table; the sentence ends at the first NUL of its 512 characters."""
    action = _joined(episode, (ACTION, Fill(0, 4), Fill(1)))
    sentences = episode["observation/instruction"]
    text = np.array([_sentence(row) for row in sentences], object)
    return Standard(action, _table(episode, "observation/effector_translation"), text)


# Changes of columns -------------------------------------------------------------------------------


def inverted(x: np.ndarray) -> np.ndarray:
    """1 - x."""
    return 1 - x


def clipped(x: np.ndarray) -> np.ndarray:
    """x within [0, 1]."""
    return np.clip(x, 0, 1)


def halved(x: np.ndarray) -> np.ndarray:
    """[-1, 1] to [0, 1]."""
    return (x + 1) / 2


def bytes_to_unit(x: np.ndarray) -> np.ndarray:
    """[0, 255] to [0, 1]."""
    return x / 255


def settled(gripper: np.ndarray) -> np.ndarray:
    """[T 1], 1 open: every value in between becomes the next one that is open or closed.

    Those at the end, after which none comes, all become the last value as it is.
    """
    x = gripper[:, 0]
    is_settled = (x > 0.95) | (x < 0.05)
    places = np.where(is_settled, np.arange(len(x)), len(x))
    following = np.minimum.accumulate(places[::-1])[::-1]
    return np.append(x > 0.95, x[-1:])[following, None].astype(np.float32)


def absolute(gripper: np.ndarray) -> np.ndarray:
    """[T 1] commands, 1 closes, -1 opens, 0 leaves as it is -> 1 open, 0 closed.

    Before the first command the gripper is as that command does not leave it; without any, open.
    """
    command = (gripper[:, 0] < -0.1).astype(int) - (gripper[:, 0] > 0.1)
    given = np.flatnonzero(command)
    if not len(given):
        return np.ones_like(gripper)
    latest = np.maximum.accumulate(np.where(command != 0, np.arange(len(command)), -1))
    states = np.append(command, -command[given[0]])[latest]  # -1: the appended one
    return halved(states[:, None]).astype(np.float32)


def euler(quaternion: np.ndarray) -> np.ndarray:
    """x, y, z, w [T 4] of any length to roll, pitch, yaw [T 3]; zeros are no rotation."""
    is_zero = ~quaternion.any(axis=1, keepdims=True)
    quaternion = np.where(is_zero, np.array([0, 0, 0, 1], np.float32), quaternion)
    return QuaternionToEuler(start=0, order="xyzw")(quaternion).astype(np.float32)


# Helpers ------------------------------------------------------------------------------------------


def _table(episode: Episode, key: str) -> np.ndarray:
    """float32 [T d]."""
    values = episode[key]
    return values.reshape(len(values), -1).astype(np.float32)


def _joined(episode: Episode, parts: tuple[Part, ...]) -> np.ndarray:
    return np.concatenate([part(episode) for part in parts], axis=1)


def _reached(state: np.ndarray, gripper: np.ndarray, first: int) -> Standard:
    """Steps but for the last, each with the change of pose to the next; `first` is the row of 0."""
    action = np.concatenate([np.diff(state[:, :6], axis=0), gripper[:-1]], axis=1)
    return Standard(action, state[:-1], rows=first + np.arange(len(action)))


def _sentence(row: str | np.ndarray) -> str:
    text = row if isinstance(row, str) else "".join(map(chr, row.tolist()))
    return text.split("\0", 1)[0]


def _rule(action: Iterable[Part], state: Iterable[Part] = ()) -> Rule:
    action, state = tuple(action), tuple(state)
    keys = dict.fromkeys(part.key for part in (*action, *state) if isinstance(part, Columns))
    return Rule(tuple(keys), partial(join, action=action, state=state))


# The sets -----------------------------------------------------------------------------------------

ACTION, STATE = Columns("action"), Columns("observation/state")
GRIPPER = Columns("action/gripper_closedness_action")
MOVE = (Columns("action/world_vector"), Columns("action/rotation_delta"))
NOTHING = (Fill(0),)  # the state of sets without one, as in Octo
_CLOSES = ACTION[-1:].then(clipped, inverted)
_SUFFIX = "_converted_externally_to_rlds"


def _observed(*keys: str) -> tuple[Columns, ...]:
    return tuple(Columns(f"observation/{key}") for key in keys)


def _bridge_rule(drop_first: bool) -> Rule:
    return Rule(("action", "observation/state"), partial(bridge, drop_first=drop_first))


_DROID = (
    Columns("action_dict/cartesian_velocity"),
    Columns("action_dict/gripper_position").then(inverted),
)
_EDAN = (ACTION[:6], ACTION[-1:].then(inverted))
_END_EFFECTOR = Columns("observation/end_effector_pose")
_GNM_KEYS = ("action", "observation/position", "observation/yaw", "observation/state")
_ALOHA = Rule(("action", "observation/state"), aloha)
_LIBERO = _rule((ACTION[:6], _CLOSES), (STATE,))
_TACO = Columns("action/rel_actions_world")
_TACO_STATE = Columns("observation/robot_obs")

RULES: Mapping[str, Rule] = {
    "fractal20220817_data": _rule(
        (*MOVE, GRIPPER.then(absolute)), _observed("base_pose_tool_reached", "gripper_closed")
    ),
    "kuka": _rule(
        (*MOVE, GRIPPER.then(absolute)),
        _observed("clip_function_input/base_pose_tool_reached", "gripper_closed"),
    ),
    "bridge_dataset": _bridge_rule(drop_first=False),
    "bridge_orig": _bridge_rule(drop_first=True),
    "bridge": Rule(("action/open_gripper", "observation/state"), bridge_0_1_0),
    "taco_play": _rule((_TACO[:6], _TACO[-1:].then(clipped)), (_TACO_STATE[:7],)),
    "jaco_play": _rule(
        (MOVE[0], Fill(0, 3), GRIPPER.then(absolute)), _observed("end_effector_cartesian_pos")
    ),
    "berkeley_cable_routing": _rule((*MOVE, Fill(0)), _observed("robot_state")),
    "roboturk": _rule((*MOVE, GRIPPER.then(clipped, inverted)), NOTHING),
    "nyu_door_opening_surprising_effectiveness": _rule((*MOVE, GRIPPER.then(absolute)), NOTHING),
    "viola": _rule(
        (*MOVE, GRIPPER.then(clipped, inverted)), _observed("joint_states", "gripper_states")
    ),
    "berkeley_autolab_ur5": _rule(
        (*MOVE, GRIPPER.then(absolute)), (Columns("observation/robot_state")[6:14],)
    ),
    "toto": _rule((*MOVE, Columns("action/open_gripper")), (STATE,)),
    "language_table": Rule(
        ("action", "observation/effector_translation", "observation/instruction"), language_table
    ),
    "columbia_cairlab_pusht_real": _rule((*MOVE, GRIPPER.then(absolute)), _observed("robot_state")),
    f"stanford_kuka_multimodal_dataset{_SUFFIX}": _rule(
        (ACTION[:3], Fill(0, 3), ACTION[-1:]), _observed("ee_position", "ee_orientation")
    ),
    f"nyu_rot_dataset{_SUFFIX}": _rule((ACTION[:6], ACTION[6:7].then(inverted)), (STATE,)),
    f"stanford_hydra_dataset{_SUFFIX}": _rule(_EDAN, (STATE[:3], STATE[7:10], STATE[-3:-2])),
    f"austin_buds_dataset{_SUFFIX}": _rule((ACTION[:6], _CLOSES), (STATE[:8],)),
    f"nyu_franka_play_dataset{_SUFFIX}": _rule(
        (ACTION[-8:-2], ACTION[-2:-1].then(clipped)), (STATE[-6:],)
    ),
    f"maniskill_dataset{_SUFFIX}": _rule(
        (ACTION[:6], ACTION[6:].then(halved)), (*_observed("tcp_pose"), STATE[7:8])
    ),
    f"furniture_bench_dataset{_SUFFIX}": _rule(
        (ACTION[:3], ACTION[3:7].then(euler), _CLOSES), (STATE[:7], STATE[-1:])
    ),
    f"cmu_franka_exploration_dataset{_SUFFIX}": _rule((ACTION[:-1],), NOTHING),
    f"ucsd_kitchen_dataset{_SUFFIX}": _rule((ACTION[:-1],), (STATE[:7],)),
    f"ucsd_pick_and_place_dataset{_SUFFIX}": _rule((ACTION[:3], Fill(0, 3), ACTION[-1:]), (STATE,)),
    f"austin_sailor_dataset{_SUFFIX}": _rule((ACTION[:6], _CLOSES), (STATE,)),
    f"austin_sirius_dataset{_SUFFIX}": _rule((ACTION[:6], _CLOSES), (STATE,)),
    "bc_z": _rule(
        (
            Columns("action/future/xyz_residual")[:3],
            Columns("action/future/axis_angle_residual")[:3],
            Columns("action/future/target_close")[:1].then(inverted),
        ),
        _observed("present/xyz", "present/axis_angle", "present/sensed_close"),
    ),
    f"utokyo_pr2_opening_fridge{_SUFFIX}": _rule((ACTION[:-1],), (STATE,)),
    f"utokyo_pr2_tabletop_manipulation{_SUFFIX}": _rule((ACTION[:-1],), (STATE,)),
    f"utokyo_xarm_pick_and_place{_SUFFIX}": _rule((ACTION,), (_END_EFFECTOR,)),
    f"utokyo_xarm_bimanual{_SUFFIX}": _rule((ACTION[-7:],), _observed("pose_r")),
    "robo_net": _rule((ACTION[:4], Fill(0, 2), ACTION[-1:]), (STATE[:4], Fill(0, 2), STATE[-1:])),
    f"berkeley_mvp{_SUFFIX}": _rule(
        (ACTION[:-1], ACTION[-1:].then(inverted)), _observed("pose", "gripper")
    ),
    f"berkeley_rpt{_SUFFIX}": Rule(
        ("action", "observation/joint_pos", "observation/gripper"), berkeley_rpt
    ),
    f"kaist_nonprehensile{_SUFFIX}": _rule((ACTION[:6], Fill(0)), (STATE[-7:],)),
    f"stanford_mask_vit{_SUFFIX}": _rule(
        (ACTION[:4], Fill(0, 2), ACTION[-1:].then(halved, inverted)),
        (_END_EFFECTOR[:4], Fill(0, 2), _END_EFFECTOR[-1:]),
    ),
    f"tokyo_u_lsmo{_SUFFIX}": _rule((ACTION,), (STATE[:6], STATE[-1:])),
    f"dlr_sara_pour{_SUFFIX}": _rule((ACTION,), (STATE,)),
    f"dlr_sara_grid_clamp{_SUFFIX}": _rule((ACTION,), (STATE[:6],)),
    f"dlr_edan_shared_control{_SUFFIX}": _rule(_EDAN, (STATE,)),
    f"asu_table_top{_SUFFIX}": _rule((ACTION,), (Columns("ground_truth_states/EE"), STATE[-1:])),
    f"stanford_robocook{_SUFFIX}": _rule((ACTION,), (STATE,)),
    "imperialcollege_sawyer_wrist_cam": _rule((ACTION[:-1],), NOTHING),
    f"iamlab_cmu_pickup_insert{_SUFFIX}": _rule(
        (ACTION[:3], ACTION[3:7].then(euler), ACTION[7:8]), (STATE[:8],)
    ),
    "uiuc_d3field": _rule((ACTION, Fill(0, 4)), NOTHING),
    "utaustin_mutex": _rule((ACTION[:6], _CLOSES), (STATE[:8],)),
    "berkeley_fanuc_manipulation": _rule((ACTION, STATE[6:7].then(inverted)), (STATE[:7],)),
    "cmu_playing_with_food": _rule((ACTION[:3], ACTION[3:7].then(euler), ACTION[-1:]), (STATE,)),
    "cmu_play_fusion": _rule((ACTION[:3], ACTION[3:7].then(euler), ACTION[7:8]), (STATE,)),
    "cmu_stretch": _rule((ACTION[:-1],), (STATE[:3], Fill(0, 3), STATE[-1:])),
    "gnm_dataset": Rule(_GNM_KEYS, partial(gnm, is_octo=False)),
    "aloha_static_dataset": _ALOHA,
    "aloha_dagger_dataset": _ALOHA,
    "aloha_mobile_dataset": _ALOHA,
    "fmb_dataset": _rule((ACTION,), _observed("eef_pose", "state_gripper_pose")),
    "dobbe": _rule((ACTION,), (STATE,)),
    "roboset": _rule((ACTION[:7], _CLOSES), (STATE,)),
    "rh20t": _rule(
        (Columns("action/tcp_base"), Columns("action/gripper")),
        _observed("tcp_base", "gripper_width"),
    ),
    "mujoco_manip": _rule((ACTION[:6], ACTION[-1:].then(bytes_to_unit, inverted))),
    "droid": _rule(_DROID, _observed("cartesian_position", "gripper_position")),
    "droid_joint_position": _rule(
        (Columns("action_dict/joint_position"), Columns("action_dict/gripper_position")),
        _observed("joint_position", "gripper_position"),
    ),
    "libero_spatial_no_noops": _LIBERO,
    "libero_object_no_noops": _LIBERO,
    "libero_goal_no_noops": _LIBERO,
    "libero_10_no_noops": _LIBERO,
}

OCTO_RULES: Mapping[str, Rule] = {
    # The first joint in the place of the gripper's width.
    "taco_play": _rule((_TACO[:6], _TACO[-1:].then(clipped)), (_TACO_STATE[:6], _TACO_STATE[7:8])),
    # Grippers of other conventions, left as they are.
    "columbia_cairlab_pusht_real": _rule((*MOVE, GRIPPER), _observed("robot_state")),
    f"nyu_rot_dataset{_SUFFIX}": _rule((ACTION[:7],), (STATE,)),
    f"maniskill_dataset{_SUFFIX}": _rule((ACTION,), (*_observed("tcp_pose"), STATE[7:8])),
    f"stanford_mask_vit{_SUFFIX}": _rule(
        (ACTION[:4], Fill(0, 2), ACTION[-1:]), (_END_EFFECTOR[:4], Fill(0, 2), _END_EFFECTOR[-1:])
    ),
    # Half a quaternion for angles, and the end of the episode for the gripper.
    "cmu_play_fusion": _rule((ACTION[:3], ACTION[-4:]), (STATE,)),
    # No state, or one of a key that the published set does not have.
    f"utokyo_xarm_pick_and_place{_SUFFIX}": _rule((ACTION,)),
    f"utokyo_xarm_bimanual{_SUFFIX}": _rule((ACTION[-7:],), (_END_EFFECTOR,)),
    # Not a number for a robot that stands still at first.
    "gnm_dataset": Rule(_GNM_KEYS, partial(gnm, is_octo=True)),
}
