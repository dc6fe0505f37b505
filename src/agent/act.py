"""`scripts/act.py`: a policy over a recorded dataset, its actions beside those that were recorded.

Which features of the dataset are pictures, state and actions comes from the checkpoint where it was
trained on such a dataset, from the command line, or from the usual names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress

from pizero.agent.driving.episodes import write_atomically
from pizero.agent.driving.replay import Replay, replay, scores
from pizero.agent.guess import Features, guess_action, guess_state, guess_text
from pizero.agent.policy import DEFAULT_NUM_STEPS, Policy, load_policy
from pizero.agent.report.replay import write_replay_report
from pizero.agent.sources import dataset_name, find_features
from pizero.agent.weights.folder import has_pipeline, own_folder, read_description
from pizero.agent.weights.inspect import KINDS
from pizero.data.dataset import EpisodeDataset, RldsDataset
from pizero.data.index import unknown_key
from pizero.data.rlds.index import splits


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and write the report; a mistake ends in one message."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        path = _run(options, console)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    console.print(f"wrote {path}", soft_wrap=True)


def _run(options: argparse.Namespace, console: Console) -> Path:
    policy = load_policy(
        options.checkpoint,
        robot=options.robot,
        statistics=options.statistics,
        tokenizer=options.tokenizer,
        action_tokenizer=options.action_tokenizer,
        kind=options.kind,
        asset=options.asset,
        overrides=pairs(options.set) or None,
        device=options.device,
        num_steps=options.num_steps,
        noise_scale=options.noise_scale,
    )
    data = open_data(
        options.dataset,
        policy,
        split=options.split,
        trained=trained_on(options.checkpoint, options.asset),
        given=_given(options),
    )
    count = min(options.episodes, data.num_episodes)
    chosen = np.unique(np.linspace(0, data.num_episodes - 1, count).round().astype(int)).tolist()
    every = options.every or _usual_every(policy)
    with Progress(console=console, transient=True) as bar:
        decisions = sum(-(-int(data.episode_lengths[e]) // every) for e in chosen)
        task = bar.add_task("deciding", total=decisions)
        replayed = replay(
            policy, data, episodes=chosen, every=every, batch_size=options.batch_size,
            seed=options.seed, progress=lambda n: bar.advance(task, n),
        )  # fmt: skip
    return write(options, policy, data, replayed)


def write(
    options: argparse.Namespace, policy: Policy, data: EpisodeDataset, replayed: Replay
) -> Path:
    """metrics.json, pictures and report.html; returns the page's path."""
    found = scores(replayed)
    directory = data.index.directory
    name = dataset_name(directory)
    cameras = {camera: " or ".join(keys) for camera, keys in data.cameras.items()}
    robot = policy.pipeline.robot
    folder = options.out or Path("outputs/act") / name
    facts = {
        "checkpoint": str(options.checkpoint),
        "dataset": str(directory),
        "split": data.split,
        "robot": None if robot is None else robot.name,
        "cameras": cameras,
        "euler_steps": policy.num_steps,
        "noise_scale": policy.noise_scale,
        "seed": options.seed,
        "device": str(policy.device),
    }
    metrics = {**facts, **found}
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    shown = {k.replace("_", " "): v for k, v in facts.items() if v is not None}
    shown["cameras"] = ", ".join(f"{n} ({k})" for n, k in cameras.items())
    return write_replay_report(
        folder,
        replayed,
        found,
        policy=_title(options.checkpoint),
        dataset=f"{name}, {data.split}",
        how=list(shown.items()),
        units=_units(policy),
    )


def open_data(
    path: str | Path,
    policy: Policy,
    *,
    split: str | None,
    trained: Mapping[str, Any],
    given: Mapping[str, Any],
) -> EpisodeDataset:
    """The data set, RLDS or LeRobot, as the policy needs it.

    Keys (cameras, state, action, text) are those `given`, else those the policy was `trained` with
    where this data set has them, else what has the usual names; ValueError, with what there is,
    where there is nothing.
    """
    directory, features, is_lerobot = find_features(path)
    keys = {what: key for what, key in trained.items() if set(_named(key)) <= features.keys()}
    keys |= given
    arguments: dict[str, Any] = {
        "path": directory,
        "cameras": _cameras(policy, features, keys.get("cameras") or {}, directory),
        "action": keys.get("action") or guess_action(features, directory),
        "text": keys.get("text") or guess_text(features),
        "horizon": policy.pipeline.horizon,
        "frames": policy.pipeline.frames,
        "state": None,
    }
    if policy.pipeline.robot_state_dim:
        arguments["state"] = keys.get("state") or guess_state(features)
        if not arguments["state"]:
            vectors = [key for key, feature in features.items() if feature.kind == "tensor"]
            raise ValueError(
                f"{directory} has nothing that is called like a state: name its keys with --state. "
                f"It has: {', '.join(vectors)}"
            )
    if is_lerobot:
        from pizero.data.lerobot import LeRobotDataset

        return LeRobotDataset(split=split or "train", **arguments)
    return RldsDataset(split=split or _usual_split(directory), **arguments)


def trained_on(checkpoint: str | Path, asset: str | None = None) -> dict[str, Any]:
    """The dataset's keys that a checkpoint of ours was trained with; empty for another.

    `asset` names one of a mix; otherwise the first counts.
    """
    folder = own_folder(checkpoint)
    if folder is None or not has_pipeline(folder):
        return {}
    config, _ = read_description(folder)

    def search(node: Any) -> Mapping[str, Any] | None:
        if not isinstance(node, Mapping):
            return None
        if "cameras" in node and "action" in node:
            return node
        return next((found for child in node.values() if (found := search(child))), None)

    node = config.get("data")
    if asset is not None:
        node = OmegaConf.select(config, f"data.train.datasets.{asset}")
    node = search(node) or {}
    return {key: node[key] for key in ("cameras", "state", "action", "text") if node.get(key)}


def pairs(words: Sequence[str]) -> dict[str, Any]:
    """key=value words; values are JSON where they can be."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"expected key=value, got {word!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _given(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "cameras": pairs(options.camera),
        "state": options.state,
        "action": options.action,
        "text": options.text,
    }
    return {key: value for key, value in given.items() if value}


def _cameras(
    policy: Policy, features: Features, given: Mapping[str, str], directory: Path
) -> dict[str, str]:
    """The policy's cameras -> image features: as given, else those of a camera's name."""
    images = [key for key, feature in features.items() if feature.kind == "image"]
    for name in given:
        if name not in policy.pipeline.cameras:
            raise unknown_key(name, policy.pipeline.cameras, where="the policy, as a camera,")
    robot, found = policy.pipeline.robot, {}
    for camera in policy.pipeline.cameras:
        names = (camera, *(robot.cameras.get(camera, ()) if robot else ()))
        fitting = [k for k in images if re.split(r"[/.]", k)[-1] in names or k in names]
        if camera in given:
            found[camera] = given[camera]
        elif fitting:
            found[camera] = fitting[0]
    if not found and len(images) == 1:
        found[policy.pipeline.cameras[0]] = images[0]
    if not found:
        raise ValueError(
            f"no picture in {directory} is named like a camera of the policy "
            f"({', '.join(policy.pipeline.cameras)}); say which is which with --camera "
            f"NAME=FEATURE. It has: {', '.join(images) or 'no pictures'}"
        )
    return found


def _named(keys: Any) -> list[str]:
    if isinstance(keys, Mapping):
        return [key for value in keys.values() for key in _named(value)]
    return [keys] if isinstance(keys, str) else list(keys)


def _usual_split(directory: Path) -> str:
    """Held-out episodes where there are some."""
    names = splits(directory)
    return next((name for name in ("val", "validation", "test") if name in names), "train")


def _usual_every(policy: Policy) -> int:
    robot = policy.pipeline.robot
    return policy.pipeline.horizon if robot is None else robot.replan


def _units(policy: Policy) -> dict[str, str]:
    from fnmatch import fnmatchcase

    robot = policy.pipeline.robot
    if robot is None:
        return {}
    return {
        name: next((u for pattern, u in robot.units.items() if fnmatchcase(name, pattern)), "")
        for name in robot.action_names
    }


def _title(checkpoint: Path) -> str:
    """A name for people: the run's and the step's, or the folder's."""
    folder = own_folder(checkpoint)
    if folder is None:
        return checkpoint.name
    config, metadata = read_description(folder)
    return f"{config.get('name', folder.name)}, step {metadata.get('step', '?')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="act.py", description="Run a policy over a recorded dataset (RLDS or LeRobot)."
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a policy in any format that is read")
    add("--dataset", type=Path, required=True, help="folder of an RLDS or a LeRobot set")
    add("--out", type=Path, help="folder to write (default: outputs/act/<dataset>)")
    add("--split", help="val if there is one, else train; ranges as in train[90%%:]")
    add("--episodes", type=int, default=4, help="how many, spread evenly (default: 4)")
    add("--every", type=int, help="steps between decisions (default: the robot's, or the chunk's)")
    add("--camera", nargs="*", default=[], metavar="NAME=FEATURE", help="the policy's cameras")
    add("--state", nargs="*", metavar="FEATURE", help="features that make the state")
    add("--action", nargs="*", metavar="FEATURE", help="features that make the action")
    add("--text", metavar="FEATURE", help="feature with the instruction")
    add("--robot", help="name in config/robot, or a YAML file (published checkpoints)")
    add("--statistics", type=Path, help="statistics, of any dialect (published checkpoints)")
    add("--tokenizer", type=Path, help="paligemma_tokenizer.model (published checkpoints)")
    add("--action-tokenizer", type=Path, help="folder of pi0-FAST's action tokenizer")
    add("--kind", choices=KINDS, help="pi0_fast tells pi0-FAST from PaliGemma")
    add("--asset", help="whose statistics, where several robots' lie beside the weights")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="model sizes: horizon=10")
    add("--num-steps", type=int, default=DEFAULT_NUM_STEPS, help="Euler steps of a decision")
    add("--noise-scale", type=float, default=1.0, help="0: the middle of the distribution")
    add("--batch-size", type=int, default=16)
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    return parser
