"""What there is to know of each Open X-Embodiment set: cameras, encodings, sentences, rate.

Names are those of the folders; the ending `_converted_externally_to_rlds` may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from pizero.data.dataset import Keys
from pizero.data.index import unknown_key
from pizero.data.oxe.transforms import OCTO_RULES, RULES
from pizero.data.standardize import Rule

SUFFIX = "_converted_externally_to_rlds"
VIEWS = ("primary", "secondary", "wrist")


class State(Enum):
    """What a state holds; the gripper comes last where there is one."""

    NONE = "nothing, for which one zero stands"
    POS_EULER = "position and roll, pitch, yaw of the end effector, gripper"
    POS_QUAT = "position and quaternion of the end effector, gripper"
    JOINT = "joint angles, gripper"
    JOINT_BIMANUAL = "two arms: six joint angles and gripper each"
    POS_NAV = "position in the plane and yaw"


def _arm(side: str = "", joints: int = 7) -> tuple[str, ...]:
    return (*(f"{side}joint_{i}" for i in range(joints)), f"{side}gripper")


class Action(Enum):
    """What an action holds; the values are the names of its entries."""

    EEF_POS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    JOINT_POS = _arm()
    JOINT_POS_BIMANUAL = (*_arm("left_", 6), *_arm("right_", 6))
    JOINT_POS_BIMANUAL_NAV = (*_arm("left_", 6), *_arm("right_", 6), "forward", "turn")
    NAV_2D = ("forward", "left")

    @property
    def mask(self) -> tuple[bool, ...]:
        """Entries to normalise: all but the grippers."""
        return tuple(not name.endswith("gripper") for name in self.value)


@dataclass(frozen=True)
class OxeSet:
    """One set.

    name         its folder
    cameras      view (primary, secondary, wrist) -> key below steps/; depth likewise
    state_dim    entries of the state that the rule makes of the published features
    text         key of the instruction, or several, of which one is drawn
    is_blank     Octo empties the instructions, because they say the same in every episode
    control_hz   steps per second after the rule, None: not known
    success      episode metadata that says whether it succeeded
    folders      other names the folder goes by
    """

    name: str
    cameras: Mapping[str, str]
    state: State
    state_dim: int
    action: Action = Action.EEF_POS
    text: Keys = "language_instruction"
    is_blank: bool = False
    control_hz: float | None = None
    depth: Mapping[str, str] = field(default_factory=dict)
    success: str | None = None
    folders: tuple[str, ...] = ()

    @property
    def rule(self) -> Rule:
        """How it is standardised."""
        return RULES[self.name]

    @property
    def action_dim(self) -> int:
        """Entries of an action."""
        return len(self.action.value)


def oxe_set(name: str) -> OxeSet:
    """The set of a name; ValueError with the nearest one if there is none."""
    for known in (name, name + SUFFIX):
        if known in OXE_SETS:
            return OXE_SETS[known]
    short = {known.removesuffix(SUFFIX) for known in OXE_SETS}
    raise unknown_key(name.removesuffix(SUFFIX), short, where="Open X-Embodiment")


def oxe_rule(name: str, *, octo_compat: bool = False) -> Rule:
    """The standardisation of a set; `octo_compat` keeps what Octo gets wrong."""
    found = oxe_set(name)
    return OCTO_RULES.get(found.name, found.rule) if octo_compat else found.rule


def views(
    primary: str | None = None, secondary: str | None = None, wrist: str | None = None
) -> dict[str, str]:
    """Keys of those cameras that there are."""
    keys = zip(VIEWS, (primary, secondary, wrist), strict=True)
    return {view: f"observation/{key}" for view, key in keys if key is not None}


_NATURAL = "observation/natural_language_instruction"
_ALOHA = views("cam_high", "cam_low", "cam_right_wrist")
_DROID = views("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
_SENTENCES = ("language_instruction", "language_instruction_2", "language_instruction_3")
_ONE, _TWO = views("image"), views("image", wrist="wrist_image")


def _libero(suite: str) -> OxeSet:
    return OxeSet(f"libero_{suite}_no_noops", _TWO, State.POS_EULER, 8, control_hz=20)


_SETS = (
    OxeSet(
        "fractal20220817_data",
        _ONE,
        State.POS_QUAT,
        8,
        text=_NATURAL,
        control_hz=3,
        success="aspects/success",
    ),
    OxeSet(
        "kuka",
        _ONE,
        State.POS_QUAT,
        8,
        text=_NATURAL,
        is_blank=True,
        control_hz=10,
        success="success",
    ),
    OxeSet(
        "bridge_dataset",
        views("image_0", "image_1"),
        State.POS_EULER,
        7,
        control_hz=5,
        folders=("bridge_orig",),
    ),
    OxeSet(
        "bridge_orig",
        views("image_0", "image_1"),
        State.POS_EULER,
        7,
        control_hz=5,
        folders=("bridge_dataset",),
    ),
    OxeSet(
        "bridge", _ONE, State.POS_EULER, 7, text=_NATURAL, control_hz=5, folders=("bridge_oxe",)
    ),
    OxeSet(
        "taco_play",
        views("rgb_static", wrist="rgb_gripper"),
        State.POS_EULER,
        7,
        text=_NATURAL,
        control_hz=15,
        depth=views("depth_static", wrist="depth_gripper"),
    ),
    OxeSet(
        "jaco_play",
        views("image", wrist="image_wrist"),
        State.POS_EULER,
        7,
        text=_NATURAL,
        control_hz=10,
    ),
    OxeSet(
        "berkeley_cable_routing",
        views("image", "top_image", "wrist45_image"),
        State.JOINT,
        7,
        text=_NATURAL,
        is_blank=True,
        control_hz=10,
    ),
    OxeSet(
        "roboturk", views("front_rgb"), State.NONE, 1, text=_NATURAL, is_blank=True, control_hz=10
    ),
    OxeSet(
        "nyu_door_opening_surprising_effectiveness",
        views(wrist="image"),
        State.NONE,
        1,
        text=_NATURAL,
        is_blank=True,
        control_hz=3,
    ),
    OxeSet(
        "viola",
        views("agentview_rgb", wrist="eye_in_hand_rgb"),
        State.JOINT,
        8,
        text=_NATURAL,
        is_blank=True,
        control_hz=20,
    ),
    OxeSet(
        "berkeley_autolab_ur5",
        views("image", wrist="hand_image"),
        State.POS_QUAT,
        8,
        text=_NATURAL,
        control_hz=5,
        depth=views("image_with_depth"),
    ),
    OxeSet("toto", _ONE, State.JOINT, 7, text=_NATURAL, is_blank=True, control_hz=30),
    OxeSet(
        "language_table",
        views("rgb"),
        State.POS_EULER,
        2,
        text="observation/instruction",
        control_hz=10,
    ),
    OxeSet("columbia_cairlab_pusht_real", _TWO, State.POS_EULER, 2, text=_NATURAL, control_hz=10),
    OxeSet(
        f"stanford_kuka_multimodal_dataset{SUFFIX}",
        _ONE,
        State.POS_QUAT,
        7,
        control_hz=20,
        depth=views("depth_image"),
    ),
    OxeSet(f"nyu_rot_dataset{SUFFIX}", _ONE, State.POS_EULER, 7, control_hz=3),
    OxeSet(
        f"stanford_hydra_dataset{SUFFIX}", _TWO, State.POS_EULER, 7, is_blank=True, control_hz=10
    ),
    OxeSet(f"austin_buds_dataset{SUFFIX}", _TWO, State.JOINT, 8, is_blank=True, control_hz=20),
    OxeSet(
        f"nyu_franka_play_dataset{SUFFIX}",
        views("image", "image_additional_view"),
        State.POS_EULER,
        6,
        is_blank=True,
        control_hz=3,
        depth=views("depth", "depth_additional_view"),
    ),
    OxeSet(
        f"maniskill_dataset{SUFFIX}",
        _TWO,
        State.POS_QUAT,
        8,
        control_hz=20,
        depth=views("depth", wrist="wrist_depth"),
    ),
    OxeSet(f"furniture_bench_dataset{SUFFIX}", _TWO, State.POS_QUAT, 8, control_hz=10),
    OxeSet(
        f"cmu_franka_exploration_dataset{SUFFIX}",
        views("highres_image"),
        State.NONE,
        1,
        control_hz=10,
    ),
    OxeSet(f"ucsd_kitchen_dataset{SUFFIX}", _ONE, State.JOINT, 7, control_hz=2),
    OxeSet(
        f"ucsd_pick_and_place_dataset{SUFFIX}",
        _ONE,
        State.POS_EULER,
        7,
        control_hz=3,
        success="episode_metadata/success",
    ),
    OxeSet(f"austin_sailor_dataset{SUFFIX}", _TWO, State.POS_QUAT, 8, is_blank=True, control_hz=20),
    OxeSet(
        f"austin_sirius_dataset{SUFFIX}",
        _TWO,
        State.JOINT,  # by its description; Octo lists it with those of end effectors
        8,
        is_blank=True,
        control_hz=20,
    ),
    OxeSet("bc_z", _ONE, State.POS_EULER, 7, text=_NATURAL, control_hz=10),
    OxeSet(f"utokyo_pr2_opening_fridge{SUFFIX}", _ONE, State.POS_EULER, 7, control_hz=10),
    OxeSet(f"utokyo_pr2_tabletop_manipulation{SUFFIX}", _ONE, State.POS_EULER, 7, control_hz=10),
    OxeSet(
        f"utokyo_xarm_pick_and_place{SUFFIX}",
        views("image", "image2", "hand_image"),
        State.POS_EULER,
        6,
        control_hz=10,
    ),
    OxeSet(f"utokyo_xarm_bimanual{SUFFIX}", _ONE, State.POS_EULER, 6, control_hz=10),
    OxeSet("robo_net", views("image", "image1"), State.POS_EULER, 7, control_hz=1),
    OxeSet(
        f"berkeley_mvp{SUFFIX}",
        views(wrist="hand_image"),
        State.POS_QUAT,
        8,
        Action.JOINT_POS,
        control_hz=5,
    ),
    OxeSet(
        f"berkeley_rpt{SUFFIX}",
        views(wrist="hand_image"),
        State.JOINT,
        8,
        Action.JOINT_POS,
        control_hz=10,
    ),
    OxeSet(f"kaist_nonprehensile{SUFFIX}", _ONE, State.POS_QUAT, 7, control_hz=10),
    OxeSet(f"stanford_mask_vit{SUFFIX}", _ONE, State.POS_EULER, 7),
    OxeSet(f"tokyo_u_lsmo{SUFFIX}", _ONE, State.POS_EULER, 7, control_hz=10),
    OxeSet(f"dlr_sara_pour{SUFFIX}", _ONE, State.POS_EULER, 6, control_hz=10),
    OxeSet(f"dlr_sara_grid_clamp{SUFFIX}", _ONE, State.POS_EULER, 6, control_hz=10),
    OxeSet(f"dlr_edan_shared_control{SUFFIX}", _ONE, State.POS_EULER, 7, control_hz=5),
    OxeSet(f"asu_table_top{SUFFIX}", _ONE, State.POS_EULER, 7, control_hz=12.5),
    OxeSet(
        f"stanford_robocook{SUFFIX}",
        views("image_1", "image_2"),
        State.POS_EULER,
        7,
        control_hz=5,
        depth=views("depth_1", "depth_2"),
    ),
    OxeSet("imperialcollege_sawyer_wrist_cam", _TWO, State.NONE, 1, control_hz=10),
    OxeSet(f"iamlab_cmu_pickup_insert{SUFFIX}", _TWO, State.JOINT, 8, control_hz=20),
    OxeSet(
        "uiuc_d3field",
        views("image_1", "image_2"),
        State.NONE,
        1,
        control_hz=1,
        depth=views("depth_1", "depth_2"),
    ),
    OxeSet("utaustin_mutex", _TWO, State.JOINT, 8, is_blank=True, control_hz=20),
    OxeSet("berkeley_fanuc_manipulation", _TWO, State.JOINT, 7, control_hz=10),
    OxeSet(
        "cmu_playing_with_food",
        views("image", wrist="finger_vision_1"),
        State.POS_EULER,
        6,
        control_hz=10,
    ),
    OxeSet("cmu_play_fusion", _ONE, State.JOINT, 8, control_hz=5),
    OxeSet("cmu_stretch", _ONE, State.POS_EULER, 7, control_hz=10),
    OxeSet("gnm_dataset", _ONE, State.POS_NAV, 3, Action.NAV_2D),
    OxeSet(
        "aloha_static_dataset",
        _ALOHA,
        State.JOINT_BIMANUAL,
        14,
        Action.JOINT_POS_BIMANUAL,
        control_hz=10,
    ),
    OxeSet(
        "aloha_dagger_dataset",
        _ALOHA,
        State.JOINT_BIMANUAL,
        14,
        Action.JOINT_POS_BIMANUAL,
        control_hz=10,
    ),
    OxeSet(
        "aloha_mobile_dataset",
        views("cam_high", wrist="cam_right_wrist"),
        State.JOINT_BIMANUAL,
        14,
        Action.JOINT_POS_BIMANUAL_NAV,
        control_hz=10,
        folders=("aloha_mobile",),
    ),
    OxeSet(
        "fmb_dataset",
        views("image_side_1", "image_side_2", "image_wrist_1"),
        State.POS_QUAT,
        8,
        control_hz=10,
        depth=views("image_side_1_depth", "image_side_2_depth", "image_wrist_1_depth"),
        folders=("fmb",),
    ),
    OxeSet("dobbe", views(wrist="wrist_image"), State.POS_EULER, 7, control_hz=3.75),
    OxeSet(
        "roboset",
        views("image_left", "image_right", "image_wrist"),
        State.JOINT,
        8,
        Action.JOINT_POS,
        control_hz=5,
        folders=("robo_set",),
    ),
    OxeSet("rh20t", views("image_front", "image_side_right", "image_wrist"), State.POS_EULER, 7),
    OxeSet("mujoco_manip", _ONE, State.NONE, 0),
    OxeSet("droid", _DROID, State.POS_EULER, 7, text=_SENTENCES, control_hz=15),
    OxeSet(
        "droid_joint_position",
        _DROID,
        State.JOINT,
        8,
        Action.JOINT_POS,
        text=_SENTENCES,
        control_hz=15,
        folders=("droid",),
    ),
    *map(_libero, ("spatial", "object", "goal", "10")),
)
OXE_SETS: Mapping[str, OxeSet] = {found.name: found for found in _SETS}
