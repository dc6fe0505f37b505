"""Named mixtures of Open X-Embodiment sets, and how one becomes data.

Weights count per frame: a set of weight 2 is seen twice as often as one of weight 1 of the same
size. Where a published list names a set twice, the first weight holds, as it does in Octo.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pizero.data.dataset import Keys, RldsDataset
from pizero.data.index import unknown_key
from pizero.data.mix import Mix
from pizero.data.oxe.registry import VIEWS, OxeSet, oxe_rule, oxe_set
from pizero.data.rlds.index import find_dataset, splits
from pizero.data.rlds.tfrecord import CorruptRecordError
from pizero.data.select import Filters

HELD_OUT = {"train": "train[:95%]", "val": "train[95%:]"}  # where a set has no split val
MISSING = ("raise", "skip")

log = logging.getLogger(__name__)


def oxe_dataset(
    *,
    name: str,
    path: str | Path,
    split: str,
    horizon: int,
    cameras: Sequence[str] | Mapping[str, Keys],
    frames: int = 1,
    stride: int = 1,
    skip_unlabeled: bool = False,
    keep_text: bool = False,
    success_only: bool = False,
    octo_compat: bool = False,
    filters: Filters | None = None,
    on_error: str = "raise",
    verify: bool = True,
    index_workers: int | None = None,
) -> RldsDataset:
    """One Open X-Embodiment set, standardised.

    name          as in `oxe_set`; `path` is its folder, or one that holds it
    split         train and val are ranges of train (95 % and 5 %) where there is no val
    cameras       views, of which those that the set has are taken; or view -> keys of one's own
    keep_text     keep instructions that say the same in every episode, which Octo empties
    success_only  leave out episodes that are marked as failed, where the set says so
    octo_compat   as Octo has it, see `OCTO_RULES` and RldsDataset

    The other arguments are RldsDataset's.
    """
    known, directory = oxe_set(name), find_dataset(path)
    if skip_unlabeled and _is_blank(known, keep_text):
        raise ValueError(
            f"{known.name} has no instruction in any episode, so skip_unlabeled leaves nothing; "
            "expected keep_text, or that it is left out"
        )
    if split in HELD_OUT and "val" not in splits(directory):
        split = HELD_OUT[split]
    try:
        return RldsDataset(
            path=directory,
            split=split,
            cameras=_cameras(known, cameras),
            horizon=horizon,
            text=None if _is_blank(known, keep_text) else known.text,
            standardize=oxe_rule(name, octo_compat=octo_compat),
            action_mask=known.action.mask,
            episodes={known.success: True} if success_only and known.success else None,
            filters=filters,
            skip_unlabeled=skip_unlabeled,
            frames=frames,
            stride=stride,
            on_error=on_error,
            octo_compat=octo_compat,
            verify=verify,
            index_workers=index_workers,
        )
    except CorruptRecordError:
        raise
    except ValueError as error:
        raise ValueError(f"{known.name}: {error}") from error


def oxe_mix(
    *,
    root: str | Path,
    mix: str | Mapping[str, float],
    split: str,
    horizon: int,
    cameras: Sequence[str],
    balance_weights: bool = True,
    exclude: Sequence[str] = (),
    missing: str = "raise",
    frames: int = 1,
    stride: int = 1,
    skip_unlabeled: bool = False,
    keep_text: bool = False,
    success_only: bool = False,
    octo_compat: bool = False,
    filters: Filters | None = None,
    on_error: str = "raise",
    verify: bool = True,
    index_workers: int | None = None,
) -> Mix:
    """Several sets in the proportions of a mixture.

    root             folder with one folder for each set, as they are downloaded
    mix              a name of MIXES, that of a set, or set -> weight
    balance_weights  multiply weights by the number of frames, as Octo does; otherwise they are
                     shares of samples
    exclude          sets of the mixture to leave out
    missing          what to do about sets that are not in `root`: raise, or skip (logged)

    The other arguments are oxe_dataset's.
    """
    if missing not in MISSING:
        raise ValueError(f"expected missing raise or skip, got {missing!r}")
    weights = mix_weights(mix)
    for name in exclude:
        if oxe_set(name).name not in weights:
            raise unknown_key(name, weights, where=f"the mixture {mix!r}")
        del weights[oxe_set(name).name]
    folders = _folders(Path(root).expanduser(), weights, missing)
    datasets = {
        name: oxe_dataset(
            name=name,
            path=folder,
            split=split,
            horizon=horizon,
            cameras=cameras,
            frames=frames,
            stride=stride,
            skip_unlabeled=skip_unlabeled,
            keep_text=keep_text,
            success_only=success_only,
            octo_compat=octo_compat,
            filters=filters,
            on_error=on_error,
            verify=verify,
            index_workers=index_workers,
        )
        for name, folder in folders.items()
    }
    sizes = {name: len(dataset) if balance_weights else 1 for name, dataset in datasets.items()}
    return Mix(datasets=datasets, weights={n: weights[n] * size for n, size in sizes.items()})


def mix_weights(mix: str | Mapping[str, float]) -> dict[str, float]:
    """Full name of each set -> weight, of a mixture by name or of one's own."""
    if isinstance(mix, str):
        if mix in MIXES:
            return dict(MIXES[mix])
        try:
            return {oxe_set(mix).name: 1.0}
        except ValueError:
            raise unknown_key(mix, MIXES, where="the list of mixtures") from None
    weights: dict[str, float] = {}
    for name, weight in mix.items():
        known = oxe_set(name).name
        if known in weights or weight <= 0:
            raise ValueError(f"expected each set once with a weight > 0, got {name}: {weight}")
        weights[known] = float(weight)
    return weights


def _is_blank(known: OxeSet, keep_text: bool) -> bool:
    return known.is_blank and not keep_text


def _cameras(known: OxeSet, wanted: Sequence[str] | Mapping[str, Keys]) -> Mapping[str, Keys]:
    if isinstance(wanted, Mapping):
        return wanted
    for view in wanted:
        if view not in VIEWS:
            raise unknown_key(view, VIEWS, where="the list of views")
    there = {view: known.cameras[view] for view in wanted if view in known.cameras}
    if not there:
        raise ValueError(
            f"{known.name} has none of the cameras {list(wanted)}; it has: "
            f"{', '.join(known.cameras)}. Add one, or leave the set out"
        )
    return there


def _folders(root: Path, names: Mapping[str, float], missing: str) -> dict[str, Path]:
    """The folder of each set that is there."""
    found: dict[str, Path] = {}
    for name in names:
        choices = [root / folder for folder in (name, *oxe_set(name).folders)]
        folder = next((choice for choice in choices if choice.is_dir()), None)
        if folder is not None:
            found[name] = folder
    absent = [name for name in names if name not in found]
    if absent and (missing == "raise" or not found):
        raise ValueError(
            f"{root}: expected a folder for each of {len(names)} sets, {len(absent)} are missing: "
            f"{', '.join(absent)}. Give missing: skip to train on the others"
        )
    if absent:
        log.warning(
            "%d of %d sets are left out, they are not in %s: %s",
            len(absent),
            len(names),
            root,
            ", ".join(absent),
        )
    return found


def _named(weights: Mapping[str, float]) -> dict[str, float]:
    return {oxe_set(name).name: float(weight) for name, weight in weights.items()}


def _renamed(weights: Mapping[str, float], *without: str) -> dict[str, float]:
    """A list as OpenVLA has it: Bridge without its first steps, and some sets left out."""
    dropped = set(_named(dict.fromkeys(without, 1)))
    names = {name: name.replace("bridge_dataset", "bridge_orig") for name in weights}
    return {names[name]: weight for name, weight in weights.items() if name not in dropped}


_RTX = _named(
    {
        "fractal20220817_data": 0.54087122203,
        "kuka": 0.8341046294,
        "bridge_dataset": 1,
        "taco_play": 2,
        "jaco_play": 2,
        "berkeley_cable_routing": 3,
        "roboturk": 1,
        "nyu_door_opening_surprising_effectiveness": 5,
        "viola": 2,
        "berkeley_autolab_ur5": 1,
        "toto": 1,
    }
)
_FRANKA = _named(
    {
        "taco_play": 1,
        "berkeley_cable_routing": 1,
        "viola": 1,
        "toto": 1,
        "stanford_hydra_dataset": 1,
        "austin_buds_dataset": 3,
        "nyu_franka_play_dataset": 3,
        "maniskill_dataset": 0.1,
        "furniture_bench_dataset": 0.1,
        "cmu_franka_exploration_dataset": 5,
        "austin_sailor_dataset": 1,
        "austin_sirius_dataset": 1,
        "berkeley_rpt": 1,
        "kaist_nonprehensile": 3,
        "stanford_robocook": 1,
        "iamlab_cmu_pickup_insert": 1,
        "utaustin_mutex": 1,
        "cmu_play_fusion": 1,
    }
)
_MAGIC_SOUP = _named(
    {
        "fractal20220817_data": 0.54087122203,
        "kuka": 0.8341046294,
        "bridge_dataset": 1,
        "taco_play": 2,
        "jaco_play": 1,
        "berkeley_cable_routing": 1,
        "roboturk": 2,
        "nyu_door_opening_surprising_effectiveness": 1,
        "viola": 2,
        "berkeley_autolab_ur5": 2,
        "toto": 1,
        "language_table": 0.1,
        "stanford_hydra_dataset": 2,
        "austin_buds_dataset": 1,
        "nyu_franka_play_dataset": 3,
        "furniture_bench_dataset": 0.1,
        "ucsd_kitchen_dataset": 2,
        "austin_sailor_dataset": 1,
        "austin_sirius_dataset": 1,
        "bc_z": 0.2,
        "dlr_edan_shared_control": 1,
        "iamlab_cmu_pickup_insert": 1,
        "utaustin_mutex": 1,
        "berkeley_fanuc_manipulation": 2,
        "cmu_stretch": 1,
    }
)
_FLEX_ACT = _named(
    {
        "berkeley_mvp": 1,
        "gnm_dataset": 1,
        "aloha_static_dataset": 3,
        "aloha_mobile_dataset": 2,
        "dobbe": 1,
        "roboset": 0.5,
        "rh20t": 0.5,
    }
)
_FULL = _named(
    dict.fromkeys(
        (
            *_RTX,
            "language_table",
            "columbia_cairlab_pusht_real",
            "stanford_kuka_multimodal_dataset",
            "nyu_rot_dataset",
            "stanford_hydra_dataset",
            "austin_buds_dataset",
            "nyu_franka_play_dataset",
            "maniskill_dataset",
            "furniture_bench_dataset",
            "cmu_franka_exploration_dataset",
            "ucsd_kitchen_dataset",
            "ucsd_pick_and_place_dataset",
            "austin_sailor_dataset",
            "austin_sirius_dataset",
            "bc_z",
            "utokyo_pr2_opening_fridge",
            "utokyo_pr2_tabletop_manipulation",
            "utokyo_xarm_pick_and_place",
            "utokyo_xarm_bimanual",
            "robo_net",
            "berkeley_mvp",
            "berkeley_rpt",
            "kaist_nonprehensile",
            "stanford_mask_vit",
            "tokyo_u_lsmo",
            "dlr_sara_pour",
            "dlr_sara_grid_clamp",
            "dlr_edan_shared_control",
            "asu_table_top",
            "stanford_robocook",
            "imperialcollege_sawyer_wrist_cam",
            "iamlab_cmu_pickup_insert",
            "uiuc_d3field",
            "utaustin_mutex",
            "berkeley_fanuc_manipulation",
            "cmu_playing_with_food",
            "cmu_play_fusion",
            "cmu_stretch",
            "gnm_dataset",
        ),
        1.0,
    )
)
_NYU_DOOR = "nyu_door_opening_surprising_effectiveness"  # a camera on the hand, and no other
_PLUS = {"bc_z": 0.2, "fmb_dataset": 1.0, "dobbe": 0.2, "droid": 0.06}
_OPENVLA_SOUP = _renamed(_MAGIC_SOUP, _NYU_DOOR, "bc_z")

# Octo's names; those of OpenVLA begin with `openvla` where Octo has another list of the name.
MIXES: Mapping[str, Mapping[str, float]] = {
    "bridge": {"bridge_dataset": 1.0},
    "fractal": {"fractal20220817_data": 1.0},
    "oxe_simple": {"fractal20220817_data": 1.0, "bridge_dataset": 1.0},
    "rtx": _RTX,
    "rtx_franka": _FRANKA | _RTX,
    "oxe_magic_soup": _MAGIC_SOUP,
    "oxe_flex_act_soup": _MAGIC_SOUP | _FLEX_ACT,
    "oxe_full": _FULL,
    "openvla_bridge": {"bridge_orig": 1.0},
    "bridge_rt_1": {"bridge_orig": 1.0, "fractal20220817_data": 1.0},
    "openvla_rtx": _renamed(_RTX, _NYU_DOOR),
    "openvla_rtx_franka": _renamed(_FRANKA | _RTX, _NYU_DOOR),
    "openvla_magic_soup": _OPENVLA_SOUP,
    "oxe_magic_soup_plus": _OPENVLA_SOUP | _PLUS,
    "oxe_magic_soup_plus_minus": {
        name: 1.0 if name == "fractal20220817_data" else weight
        for name, weight in (_OPENVLA_SOUP | _PLUS).items()
        if name not in ("language_table", "droid")
    },
    "libero": dict.fromkeys(
        (f"libero_{s}_no_noops" for s in ("spatial", "object", "goal", "10")), 1.0
    ),
}
