"""Data sets as a command line names them: a folder, a registered set, or a configuration's data.

    show_dataset.py data/bridge_dataset                      RLDS; keys are guessed and shown
    show_dataset.py data/aloha_coffee                        LeRobot: has meta/info.json
    show_dataset.py bridge_dataset --root data               Open X-Embodiment: a set or a mixture,
                                                             standardised as registered
    show_dataset.py --config-name train_bridge data.path=... the training data of a configuration

All end in `Sources`: the data sets by name, each with what is known of its robot, and the mixture
that they make, if they do.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from pizero.agent.checkpoint import pipelines_of
from pizero.agent.config import build, load_config
from pizero.agent.guess import Feature, guess_action, guess_cameras, guess_state, guess_text
from pizero.agent.published import robot_node
from pizero.data.dataset import EpisodeDataset, RldsDataset
from pizero.data.index import unknown_key
from pizero.data.mix import Mix
from pizero.data.oxe import MIXES, OXE_SETS, Action, OxeSet, State, oxe_mix, oxe_set
from pizero.data.oxe.registry import VIEWS
from pizero.data.rlds.index import find_dataset, splits
from pizero.data.rlds.spec import DatasetSpec
from pizero.data.robot import Robot
from pizero.data.stats import Statistics, compute_statistics, load_statistics

INFO = "meta/info.json"  # of a LeRobot set
KEYS = ("cameras", "state", "action", "text")
HORIZON = 16  # where neither the command, nor a robot, nor a configuration says

Found = Mapping[str, tuple[Any, str]]  # what -> its keys, and how they were found


@dataclass(frozen=True)
class Learning:
    """How a policy would learn a data set: what a robot or a configuration says of it."""

    whose: str  # who says so, for people
    normalization: Mapping[str, str | Mapping[str, Any]]
    statistics: Mapping[str, Statistics] | None = None  # None: those of the data itself
    origin: str = ""  # of the statistics that are given
    delta_mask: tuple[bool, ...] | None = None
    state_dim: int | None = None  # of the model; None: not known, or it has no state
    action_dim: int | None = None


@dataclass(frozen=True)
class Source:
    """One data set, and what is known of it."""

    name: str
    dataset: EpisodeDataset
    keys: Found
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    robot: Robot | None = None
    fps: float | None = None
    learning: Learning | None = None
    problems: tuple[str, ...] = ()  # why training would refuse the data as they are

    def unit(self, name: str) -> str:
        """The unit of a dimension; empty if it is not known."""
        units = {} if self.robot is None else self.robot.units
        return next((unit for pattern, unit in units.items() if fnmatchcase(name, pattern)), "")


@dataclass(frozen=True)
class Sources:
    """What a command names: one data set, or several as a mixture."""

    title: str
    parts: tuple[Source, ...]
    mix: Mix | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which data, shared by all commands that look at data."""
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="DATASET",
        help="folder of an RLDS or LeRobot set, or a LeRobot set's name on the Hub; with --root, "
        "an Open X-Embodiment set or mixture; with --config-name, key=value",
    )
    add("--config-name", metavar="NAME", help="the training data of config/NAME.yaml")
    add("--root", type=Path, help="folder that has the Open X-Embodiment sets")
    add("--split", help="as in train[:95%%] (default: train, or the only one)")
    add("--camera", nargs="*", default=[], metavar="NAME=KEY", help="(default: all pictures)")
    add("--state", nargs="*", metavar="KEY", help="keys that make the state")
    add("--action", nargs="*", metavar="KEY", help="keys that make the action")
    add("--text", metavar="KEY", help="key of the instruction")
    add("--robot", help="name in config/robot, or a YAML file: names, units, rate, normalisation")
    add("--fps", type=float, help="actions per second, where neither robot nor data say")
    add("--horizon", type=int, help=f"actions of a chunk (default: the robot's, else {HORIZON})")


def open_sources(options: argparse.Namespace, *, lenient: bool = False) -> Sources:
    """The data that parsed options name; ValueError in the user's words where there are none.

    `lenient` opens data that training would refuse, and keeps why as `Source.problems`.
    """
    robot = None if options.robot is None else build(robot_node(options.robot), path="--robot")
    given = _given(options)
    by_name = "--config-name" if options.config_name else "--root" if options.root else None
    if by_name and given:
        raise ValueError(f"{by_name} says which keys are read, got --{next(iter(given))} too")
    if options.config_name is not None:
        if options.split is not None:
            raise ValueError("--config-name says which split; change it as in data.train.split=val")
        return open_configured(options.config_name, options.words, robot=robot, fps=options.fps)
    if len(options.words) != 1:
        got = " ".join(options.words) or "neither"
        raise ValueError(f"expected one data set or --config-name NAME, got {got}")
    (name,) = options.words
    if options.root is not None:
        split = options.split or "train"
        return open_registered(name, options.root, split=split, horizon=options.horizon)
    source = open_folder(
        name,
        split=options.split,
        given=given,
        robot=robot,
        fps=options.fps,
        horizon=options.horizon,
        lenient=lenient,
    )
    return Sources(source.name, (source,))


def open_folder(
    path: str | Path,
    *,
    split: str | None = None,
    given: Mapping[str, Any] | None = None,
    robot: Robot | None = None,
    fps: float | None = None,
    horizon: int | None = None,
    lenient: bool = False,
) -> Source:
    """A data set of its own, RLDS or LeRobot. `given` are keys (cameras, state, action, text);
    others are guessed. ValueError, with what there is, where nothing is called as usual."""
    given = dict(given or {})
    horizon = horizon or (HORIZON if robot is None else robot.horizon)
    directory, features, is_lerobot = find_features(path)
    guesses = {
        "cameras": lambda: guess_cameras(features, robot),
        "state": lambda: guess_state(features),
        "action": lambda: guess_action(features, directory),
        "text": lambda: guess_text(features),
    }
    for keys in given.values():
        named = keys.values() if isinstance(keys, Mapping) else _several(keys)
        for key in named:
            if key not in features:
                raise unknown_key(key, features, where=str(directory))
    keys = {what: given[what] if what in given else guesses[what]() for what in KEYS}
    names: dict[str, tuple[str, ...]] = {}
    if is_lerobot:
        from pizero.data.lerobot import LeRobotDataset

        relaxed: tuple[dict[str, Any], ...] = (
            {"tolerance_s": math.inf},
            {"tolerance_s": math.inf, "on_error": "skip"},
        )
        make = partial(LeRobotDataset, path=directory, split=split or "train", horizon=horizon)
        dataset, problems = _open(partial(make, **keys), relaxed if lenient else ())
        fps = dataset.fps if fps is None else fps
        names = _lerobot_names(directory, keys)
    else:
        make = partial(
            RldsDataset, path=directory, split=split or usual_split(directory), horizon=horizon
        )
        dataset, problems = _open(partial(make, **keys), ({"on_error": "skip"},) if lenient else ())
    how = {what: (keys[what], "given" if what in given else "guessed") for what in KEYS}
    source = make_source(
        dataset_name(directory), dataset, keys=how, robot=robot, fps=fps, names=names
    )
    return replace(source, problems=problems)


def open_registered(
    name: str, root: str | Path, *, split: str = "train", horizon: int | None = None
) -> Sources:
    """An Open X-Embodiment set, or a mixture, by its registered name, as mixtures learn it."""
    mix = oxe_mix(root=root, mix=name, split=split, horizon=horizon or HORIZON, cameras=VIEWS)
    sources = tuple(
        make_source(part, dataset, **_registered(oxe_set(part), dataset))
        for part, dataset in mix.datasets.items()
    )
    return Sources(name, sources, mix if len(sources) > 1 else None)


def open_configured(
    name: str,
    overrides: Sequence[str] = (),
    *,
    robot: Robot | None = None,
    fps: float | None = None,
    role: str = "train",
) -> Sources:
    """The training (or, by `role`, validation) data of a configuration, with how it learns them.

    `robot` gives names to dimensions where the configuration has no robot of its own.
    """
    config = load_config(name, overrides)
    if not hasattr(config, "data"):
        raise ValueError(f"expected the configuration of a training run, {name!r} has no data")
    node = getattr(config.data, role)
    data = build(node, path=f"data.{role}")
    if not isinstance(data, Mix):
        data, node = Mix(datasets={config.name: data}), {"datasets": {config.name: node}}
    own = pipelines_of(config)
    sources = []
    for part, dataset in data.datasets.items():
        pipeline = {**config.pipeline, **(own or {}).get(part, {})}
        learning, known = _configured_learning(pipeline, whose=f"config {name}")
        known = robot if known is None else known
        if learning.statistics is None and own is None and len(data.datasets) > 1:
            # One pipeline for all normalises them by what they have in common.
            together = compute_statistics(data, delta_mask=learning.delta_mask, robot=known)
            learning = replace(learning, statistics=together, origin="all data sets together")
        said = node.get("datasets", {}).get(part, {"name": part})  # oxe_mix names its sets itself
        keys = {what: (said.get(what), f"config {name}") for what in KEYS}
        about: dict[str, Any] = {"keys": keys}
        if "name" in said:
            about = _registered(oxe_set(said["name"]), dataset)
        elif "fps" in dataset.index.facts:  # LeRobot
            names = _lerobot_names(dataset.index.directory, said)
            about |= {"fps": dataset.index.facts["fps"], "names": names}
        if fps is not None:
            about["fps"] = fps
        sources.append(make_source(part, dataset, robot=known, learning=learning, **about))
    return Sources(config.name, tuple(sources), data if len(sources) > 1 else None)


def make_source(
    name: str,
    dataset: EpisodeDataset,
    *,
    keys: Found,
    robot: Robot | None = None,
    fps: float | None = None,
    learning: Learning | None = None,
    names: Mapping[str, tuple[str, ...]] | None = None,
) -> Source:
    """A data set with names of its dimensions: the robot's, or `names`, or numbers.

    Raises ValueError where the robot has other sizes than the data.
    """
    called = {}
    for what, size in (("state", dataset.state_dim), ("action", dataset.action_dim)):
        called[what] = tuple((names or {}).get(what, ()))
        if robot is not None and size:
            called[what] = robot.state_names if what == "state" else robot.action_names
            if len(called[what]) != size:
                raise ValueError(
                    f"robot {robot.name!r} has a {what} of {len(called[what])} entries "
                    f"({', '.join(called[what])}), {name} one of {size}; say which keys make it "
                    f"with --{what}"
                )
        if len(called[what]) != size:
            called[what] = tuple(f"{what} {i}" for i in range(size))
    if learning is None and robot is not None and robot.normalization is not None:
        statistics = None
        if robot.statistics is not None:
            statistics = load_statistics(robot.statistics, dataset=robot.dataset)
        whose, origin = f"robot {robot.name}", str(robot.statistics)
        learning = Learning(whose, robot.normalization, statistics, origin, robot.delta_mask)
    return Source(
        name=name,
        dataset=dataset,
        keys=keys,
        state_names=called["state"],
        action_names=called["action"],
        robot=robot,
        fps=robot.control_hz if fps is None and robot is not None else fps,
        learning=learning,
    )


def _configured_learning(
    pipeline: Mapping[str, Any], *, whose: str
) -> tuple[Learning, Robot | None]:
    """How a configuration's pipeline learns, and its robot; what it leaves out is the robot's."""
    node = pipeline.get("robot")
    robot: Robot | None = None if node is None else build(node, path="pipeline.robot")
    statistics, dataset = pipeline.get("statistics"), None
    normalization, mask = pipeline.get("normalization"), pipeline.get("delta_mask")
    if robot is not None:
        if statistics is None:
            statistics, dataset = robot.statistics, robot.dataset
        normalization = robot.normalization if normalization is None else normalization
        mask = robot.delta_mask if mask is None else mask
    learning = Learning(
        whose=whose,
        normalization=normalization or {},
        statistics=None if statistics is None else load_statistics(statistics, dataset=dataset),
        origin=str(statistics) if isinstance(statistics, str | Path) else "the configuration",
        delta_mask=tuple(mask) if mask else None,
        state_dim=pipeline.get("state_dim"),
        action_dim=pipeline.get("action_dim"),
    )
    return learning, robot


def usual_split(directory: Path) -> str:
    """`train` where there is one, else the only split; ValueError, with their names, if neither."""
    names = splits(directory)
    if "train" in names:
        return "train"
    if len(names) == 1:
        return names[0]
    raise ValueError(
        f"{directory} has no split 'train'; choose one with --split. It has: "
        f"{', '.join(names) or 'no TFRecord files'}"
    )


def dataset_splits(dataset: EpisodeDataset) -> list[str]:
    """The names of all splits of a data set."""
    found = dataset.index.facts.get("splits")  # LeRobot's say it
    return splits(dataset.index.directory) if found is None else list(found)


def dataset_name(directory: Path) -> str:
    """The name of a data set whose folder may be that of a version or a snapshot of it."""
    if directory.parent.name == "snapshots":
        return directory.parents[1].name.removeprefix("datasets--").replace("--", "/")
    return directory.parent.name if directory.name[:1].isdigit() else directory.name


def find_features(path: str | Path) -> tuple[Path, dict[str, Feature], bool]:
    """The folder of a data set, the features of its steps, and whether it is LeRobot's."""
    place = Path(path).expanduser()
    if (place / INFO).is_file() or not place.exists():
        try:
            from pizero.data.lerobot.files import find_set
            from pizero.data.lerobot.meta import read_meta
        except ImportError as error:
            if not place.exists():
                raise ValueError(_nowhere(str(path))) from error
            raise ValueError(
                f"reading LeRobot sets needs {error.name}: pip install 'pizero[lerobot]'"
            ) from error
        try:
            directory = find_set(path)
        except ValueError as error:
            raise ValueError(_nowhere(str(path))) from error
        meta = read_meta(directory)
        features = {
            key: Feature("image" if f.kind == "video" else f.kind, f.dtype, f.shape)
            for key, f in meta.features.items()
            if not f.is_depth
        }
        return directory, features | {"task": Feature("text", "string", ())}, True
    directory = find_dataset(place)
    spec = DatasetSpec.load(directory / "features.json")
    return directory, {k: Feature(f.kind, f.dtype, f.shape) for k, f in spec.steps.items()}, False


def _nowhere(name: str) -> str:
    known = [*MIXES, *OXE_SETS]
    hint = ""
    if name in known:
        hint = "; it is the name of an Open X-Embodiment set or mixture: give --root too"
    elif near := get_close_matches(name, known, 1):
        hint = f"; with --root, did you mean {near[0]!r}?"
    return (
        f"no data set {name!r}: expected a folder with an RLDS set (features.json) or a LeRobot "
        f"set ({INFO}), or the Hub's name of a LeRobot set that is on this machine{hint}"
    )


def _open(
    make: Callable[..., Any], relaxed: Sequence[Mapping[str, Any]]
) -> tuple[Any, tuple[str, ...]]:
    """What `make` makes; where that is refused and something more patient works, also why."""
    try:
        return make(), ()
    except ValueError as error:
        for arguments in relaxed:
            try:
                return make(**arguments), (str(error),)
            except ValueError:
                continue
        raise


def _lerobot_names(directory: Path, keys: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What meta/info.json calls the entries of the state and the action, as far as it does."""
    features = json.loads((directory / INFO).read_text())["features"]
    found = {}
    for what in ("state", "action"):
        names: list[str] = []
        for key in _several(keys.get(what)):
            said = features.get(key, {}).get("names") or []
            if isinstance(said, Mapping):  # e.g. {"motors": [...]}
                said = [name for part in said.values() if isinstance(part, list) for name in part]
            names += map(str, said)
        if len(set(names)) == len(names):
            found[what] = tuple(names)
    return found


def _registered(known: OxeSet, dataset: EpisodeDataset) -> dict[str, Any]:
    """What make_source takes of a registered set."""
    text = None if known.is_blank else known.text  # else the same in every episode
    return {
        "keys": {
            "cameras": (dataset.cameras, "registered"),
            "state and action": (known.rule.keys, "standardised as registered"),
            "text": (text, "registered"),
        },
        "fps": known.control_hz,
        "names": {"action": known.action.value, "state": _state_names(known)},
    }


def _state_names(known: OxeSet) -> tuple[str, ...]:
    """Names of a registered set's state, where its encoding says them."""
    place, gripper = ("x", "y", "z"), ("gripper",)
    names = {
        State.POS_EULER: (*place, "roll", "pitch", "yaw", *gripper),
        State.POS_QUAT: (*place, "qx", "qy", "qz", "qw", *gripper),
        State.JOINT: Action.JOINT_POS.value,
        State.JOINT_BIMANUAL: Action.JOINT_POS_BIMANUAL.value,
    }.get(known.state, ())
    return names if len(names) == known.state_dim else ()


def _several(keys: Any) -> list[str]:
    return [] if keys is None else [keys] if isinstance(keys, str) else list(keys)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "cameras": _cameras(options.camera),
        "state": options.state,
        "action": options.action,
        "text": options.text,
    }
    return {key: value for key, value in given.items() if value is not None}


def _cameras(words: Sequence[str]) -> dict[str, str] | None:
    for word in words:
        if not all(word.partition("=")):
            raise ValueError(f"expected --camera NAME=KEY, got {word!r}")
    return dict(word.split("=", 1) for word in words) or None
