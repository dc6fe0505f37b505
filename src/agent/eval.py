"""Evaluation in a simulator: a checkpoint folder in, success rates with intervals out.

    python scripts/run.py --config-name=eval_demo checkpoint=outputs/demo/train/checkpoints/latest

An evaluation has arms, the answers to "compared with what?": the trained policy, the same network
before training, the trained policy told to do another task than the scene was set up for. All arms
see the same starts, which come from a pool that no demonstration was made from.

The run folder holds `episodes.jsonl` (a killed evaluation continues from it), `results.json`,
`actions/`, `videos/` and `report.html`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from pizero.agent.config import build, to_yaml
from pizero.agent.driving.episodes import Episode, EpisodeLog, EpisodeResult, write_atomically
from pizero.agent.driving.films import FilmConfig, action_file, choose_films, film_episodes
from pizero.agent.driving.held_out import compare_with_expert
from pizero.agent.driving.progress import EvalProgress, logged_to
from pizero.agent.driving.rollout import RolloutSettings, run_episodes
from pizero.agent.driving.scores import summarise
from pizero.agent.env.client import EnvClient
from pizero.agent.machine import hardware, versions
from pizero.agent.policy import Policy, load_policy
from pizero.agent.report import write_report
from pizero.agent.weights.folder import find_checkpoint, own_folder
from pizero.data.mix import Mix
from pizero.model import PiZeroFast

log = logging.getLogger(__name__)


class SuccessRule(Enum):
    """Which step of an episode has to show success."""

    any = "any"  # at least one
    end = "end"  # the last


class Weights(Enum):
    """Which weights drive an arm."""

    checkpoint = "checkpoint"
    random = "random"  # the same model before training


@dataclass
class ArmConfig:
    """One condition of the evaluation."""

    weights: Weights
    starts: int  # episodes of each task
    tasks: list[str] | None  # null: all tasks of the evaluation
    swap: dict[str, str] | None  # task -> the task whose sentence is said instead of its own
    film: FilmConfig


@dataclass
class EvalConfig:
    """Root of every config/eval_*.yaml; config/eval/default.yaml explains the values."""

    _target_: str
    name: str
    run_dir: str
    checkpoint: str
    load: dict[str, Any]  # further arguments of load_policy, for a published checkpoint
    asset: str | None
    env: Any  # starts a simulator process: config/env/*.yaml
    workers: int  # simulator processes
    tasks: list[str] | None
    pool: str
    arms: dict[str, ArmConfig]
    success: SuccessRule
    steps_after_success: int | None
    act_steps: int
    max_steps: int | None
    num_steps: int
    noise_scale: float
    seed: int
    device: str
    threads: int | None
    film_height: int
    film_options: dict[str, Any]
    held_out_frames: int
    report: bool


class EvalWorkspace:
    """Runs the episodes of an EvalConfig that are not yet on disk, and writes up all of them."""

    def __init__(self, config: EvalConfig) -> None:
        if not config.arms:
            raise ValueError("an evaluation needs at least one arm; the first one is the headline")
        if config.act_steps < 1:
            raise ValueError(f"act_steps must be at least 1, got {config.act_steps}")
        self.config = config
        self.folder = Path(config.run_dir)
        self.launch = build(config.env, path="env")

    def run(self) -> None:
        config = self.config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint = Path(config.checkpoint)
        if own_folder(checkpoint) is not None or not checkpoint.exists():
            checkpoint = find_checkpoint(checkpoint)
        with logged_to(self.folder / "run.log"), ExitStack() as stack:
            workers = [stack.enter_context(self.launch()) for _ in range(config.workers)]
            world = workers[0].call("describe")
            episodes = plan_episodes(config, world)
            protocol = make_protocol(config, world, checkpoint)
            policies = self._policies(checkpoint, world)
            record = EpisodeLog(self.folder / "episodes.jsonl", protocol=protocol)
            write_atomically(self.folder / "config.yaml", to_yaml(config))
            timing = self._run(episodes, record, workers, policies, protocol["max_steps"])
            stack.close()  # the workers' memory is better used by those that film
            results = [record.results[e.key] for e in episodes]
            films = self._film(results, fps=world["control_hz"])
            policy = policies[Weights.checkpoint.value]
            self._compare(policy, checkpoint)
        summary = {
            "name": config.name,
            "fingerprint": record.fingerprint,
            "protocol": record.protocol,
            "headline_arm": next(iter(config.arms)),
            "rule": config.success.value,
            "arms": self._arms(results),
            "sentences": {task: world["tasks"][task]["sentences"] for task in protocol["tasks"]},
            "checkpoint": describe_checkpoint(checkpoint),
            "model": describe_model(policy),
            "timing": timing,
            "films": films,
            "hardware": hardware(),
            "versions": versions(),
        }
        write_atomically(self.folder / "results.json", json.dumps(summary, indent=1) + "\n")
        if config.report:
            write_report(
                self.folder / "report.html",
                evaluation=self.folder,
                training=run_folder(checkpoint),
                title=config.name,
            )

    def _policies(self, checkpoint: Path, world: Mapping[str, Any]) -> dict[str, Policy]:
        config = self.config
        wanted = {Weights.checkpoint, *(arm.weights for arm in config.arms.values())}
        policies = {}
        for weights in sorted(wanted, key=lambda w: w.value):
            policies[weights.value] = load_policy(
                checkpoint,
                **config.load,
                asset=config.asset,
                device=config.device,
                num_steps=config.num_steps,
                noise_scale=config.noise_scale,
                weights=weights.value,
                seed=config.seed,
            )
        policy = policies[Weights.checkpoint.value]
        check_fit(policy, world, act_steps=config.act_steps)
        tasks = [world["tasks"][name] for name in config.tasks or world["tasks"]]
        policy.pipeline.refuse_long({text for task in tasks for text in task["sentences"]})
        return policies

    def _run(
        self,
        episodes: Sequence[Episode],
        record: EpisodeLog,
        workers: Sequence[EnvClient],
        policies: Mapping[str, Policy],
        max_steps: int,
    ) -> dict[str, float]:
        config = self.config
        left = [e for e in episodes if e.key not in record.results]
        if len(left) < len(episodes):
            log.info(
                "%d of %d episodes are already on disk", len(episodes) - len(left), len(episodes)
            )
        settings = RolloutSettings(
            pool=config.pool,
            act_steps=config.act_steps,
            max_steps=max_steps,
            steps_after_success=config.steps_after_success,
            seed=config.seed,
        )
        done = [record.results[e.key] for e in episodes if e.key in record.results]
        with EvalProgress(episodes, finished=done, rule=config.success.value) as progress:

            def finish(result: EpisodeResult, actions: np.ndarray) -> None:
                save_actions(action_file(self.folder, result.key), actions)
                record.append(result)
                progress.add(result)

            timing = run_episodes(
                left, workers=workers, policies=policies, settings=settings, on_result=finish
            )
        return {"episodes": len(left), **asdict(timing)}

    def _film(self, results: Sequence[EpisodeResult], *, fps: float) -> list[dict[str, Any]]:
        config = self.config
        wanted = {name: arm.film for name, arm in config.arms.items()}
        chosen = choose_films(results, film=wanted, rule=config.success.value)
        if not chosen:
            return []
        options = config.env["options"] | config.film_options
        with ExitStack() as stack:
            workers = [
                stack.enter_context(self.launch(options=options))
                for _ in range(min(config.workers, len(chosen)))
            ]
            return film_episodes(
                chosen,
                folder=self.folder,
                workers=workers,
                pool=config.pool,
                fps=fps,
                height=config.film_height,
                rule=config.success.value,
            )

    def _compare(self, policy: Policy, checkpoint: Path) -> None:
        """Predicted chunks beside the expert's, where the run's held-out episodes are here."""
        if not self.config.held_out_frames:
            return
        if own_folder(checkpoint) is None:
            return
        training = OmegaConf.load(checkpoint / "config.yaml")
        try:
            data = build(training.data.val, path="data.val", packages=("pizero",))
            if self.config.asset is not None and isinstance(data, Mix):
                data = data.datasets[self.config.asset]
        except (ValueError, OSError) as error:
            log.warning("no comparison with held-out episodes: %s", error)
            return
        compared = compare_with_expert(
            policy, data, num_frames=self.config.held_out_frames, seed=self.config.seed
        )
        write_atomically(self.folder / "held_out.json", json.dumps(compared) + "\n")

    def _arms(self, results: Sequence[EpisodeResult]) -> dict[str, dict]:
        arms = summarise(results, headline=self.config.success.value)
        for name, arm in self.config.arms.items():
            arms[name] |= {"weights": arm.weights.value, "swap": arm.swap}
        return arms


def plan_episodes(config: EvalConfig, world: Mapping[str, Any]) -> list[Episode]:
    """Every episode of every arm, in the order in which they are begun."""
    known = world["tasks"]
    tasks = list(known) if config.tasks is None else config.tasks
    for task in tasks:
        require(task, known, what="the simulator has no task")
    episodes = []
    for name, arm in config.arms.items():
        if arm.starts < 1:
            raise ValueError(f"arms.{name}.starts must be at least 1, got {arm.starts}")
        swap = arm.swap or {}
        for task in [*swap, *swap.values(), *(arm.tasks or [])]:
            require(task, tasks, what=f"arms.{name} names a task that is not evaluated:")
        for task in arm.tasks or (list(swap) if swap else tasks):
            named = swap.get(task)
            sentences = known[named]["sentences"] if named else [None]
            episodes += [
                Episode(
                    arm=name,
                    weights=arm.weights.value,
                    task=task,
                    start=start,
                    text=sentences[start % len(sentences)],
                    named_task=named,
                )
                for start in range(arm.starts)
            ]
    return episodes


def make_protocol(config: EvalConfig, world: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Everything that decides what the rates of this evaluation mean."""
    tasks = list(world["tasks"]) if config.tasks is None else config.tasks
    arms = {}
    for name, arm in config.arms.items():
        arms[name] = {
            "weights": arm.weights.value,
            "starts": arm.starts,
            "tasks": arm.tasks or (list(arm.swap) if arm.swap else tasks),
            "swap": arm.swap,
        }
    return {
        "simulator": config.env["simulator"],
        "simulator_version": world.get("version", "unknown"),
        "simulator_options": config.env["options"],
        "tasks": tasks,
        "pool": config.pool,
        "arms": arms,
        "steps_after_success": config.steps_after_success,
        "act_steps": config.act_steps,
        "max_steps": min(config.max_steps or world["max_steps"], world["max_steps"]),
        "num_steps": config.num_steps,
        "noise_scale": config.noise_scale,
        "seed": config.seed,
        "checkpoint": digest_of_weights(checkpoint),
        **({} if config.asset is None else {"asset": config.asset}),
        **({"load": config.load} if config.load else {}),
    }


def check_fit(policy: Policy, world: Mapping[str, Any], *, act_steps: int) -> None:
    """Refuses a policy and a simulator that do not belong together, before any episode."""
    wrong = []
    robot = policy.pipeline.robot
    names = {c: (c,) for c in policy.pipeline.cameras}
    if robot is not None:
        names = {slot: (*known, slot) for slot, known in robot.cameras.items() if known}
    if missing := [c for c, known in names.items() if not set(known) & set(world["cameras"])]:
        wrong.append(f"the policy sees cameras {missing}, the simulator has {world['cameras']}")
    if policy.pipeline.frames > 1:
        wrong.append(f"the policy reads {policy.pipeline.frames} frames, an evaluation gives one")
    if policy.pipeline.robot_action_dim != world["action_dim"]:
        wrong.append(
            f"the policy's actions have {policy.pipeline.robot_action_dim} dimensions, the "
            f"simulator's {world['action_dim']}"
        )
    if act_steps > policy.model.horizon:
        wrong.append(f"act_steps is {act_steps}, but a chunk has {policy.model.horizon} steps")
    if wrong:
        raise ValueError("; ".join(wrong))


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Where the weights come from, in a few plain entries."""
    here = Path.cwd()
    shown = str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
    if own_folder(folder) is None:
        return {"folder": shown, "weights": "published"}
    metadata = json.loads((folder / "metadata.json").read_text())
    kept = ("step", "samples", "weights")
    commit = metadata["versions"].get("git commit")
    trained = {"trained at git commit": commit} if commit else {}
    return {"folder": shown, **{k: metadata[k] for k in kept}, **trained}


def describe_model(policy: Policy) -> dict[str, Any]:
    """Sizes of the experts and the layout of the tokens, for the report."""
    model, pipeline = policy.model, policy.pipeline
    parameters = {
        name: sum(p.numel() for p in group) for name, group in model.parameter_groups().items()
    }
    if fixed := sum(p.numel() for p in model.parameters()) - sum(parameters.values()):
        parameters["not trained"] = fixed
    picture = np.zeros((*pipeline.image_size, 3), dtype=np.uint8)
    state = np.full(pipeline.robot_state_dim, 0.5) if pipeline.robot_state_dim else None
    images = dict.fromkeys(pipeline.cameras, picture)
    with torch.inference_mode():
        blank = policy.observe([{"images": images, "text": "", "state": state}])
        if isinstance(model, PiZeroFast):
            layout = model.embed(blank)[2]
        else:
            layout = model.embed_prefix(blank)[2] + model.suffix_layout()
    return {
        "parameters": parameters,
        "segments": [asdict(s) for s in layout.segments],
        "horizon": model.horizon,
        "num_steps": policy.num_steps,
        "noise_scale": policy.noise_scale,
    }


def run_folder(checkpoint: Path) -> Path | None:
    """The training run a checkpoint lies in, if it still lies in one."""
    folder = checkpoint.parent.parent
    return folder if (folder / "metrics.jsonl").is_file() else None


def save_actions(path: Path, actions: np.ndarray) -> None:
    """Writes executed actions whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.npy")
    np.save(temporary, actions, allow_pickle=False)
    os.replace(temporary, path)


def digest_of_weights(checkpoint: Path) -> str:
    """Sixteen hex digits of the weights of a folder of ours, or of all files of another."""
    if own_folder(checkpoint) is not None:
        return digest(checkpoint / "model.safetensors")
    if checkpoint.is_file():
        return digest(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    told = "".join(f"{path.relative_to(checkpoint)} {digest(path)}\n" for path in files)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    """Sixteen hex digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def require(name: str, known: Iterable[str], *, what: str) -> None:
    """A name must be among the known ones; the error suggests the nearest."""
    names = list(known)
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {names}"
        raise ValueError(f"{what} {name!r}{hint}")
