"""Collect demonstrations: several simulators play their experts, one writer stores RLDS.

What is collected follows from the configuration alone: every task's first `episodes_per_task`
starts of the pool "demo", the first few of them held out as the split `val`, with noise levels and
displaced starts in rotation. So a collection that was stopped continues where it was, in whatever
order and by however many workers, and the result is the same. An episode in which the expert fails
is dropped and remembered in `failed.jsonl`; `collection.json` holds the settings and the counts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pizero.agent.config import build
from pizero.agent.env.pool import WorkerPool
from pizero.data.rlds.spec import FeatureSpec
from pizero.data.rlds.writer import RldsWriter


@dataclass
class CollectConfig:
    """Root of every config/collect_*.yaml."""

    _target_: str
    output: str  # the dataset is written to <output>/<name>/<version>
    name: str
    version: str
    env: Any  # starts a simulator process: config/env/*.yaml
    episodes_per_task: int  # starts tried for each task, held-out ones included
    val_episodes_per_task: int
    noise: dict[str, list[float]]  # by task, levels in rotation; "default" for the others
    displace: bool  # begin every second round of the rotation from a displaced hand
    hold: int  # steps recorded after success, which show how to stay
    workers: int | None  # simulator processes; null: one for each core
    image_encoding: str  # jpeg or png
    image_quality: int  # of a JPEG
    shards: int  # files of each split


@dataclass(frozen=True)
class Job:
    """One demonstration to be made."""

    task: str
    start: int
    split: str
    noise: float
    displace: bool

    @property
    def key(self) -> str:
        return f"{self.task}/{self.start:06d}"


class CollectWorkspace:
    """`run()` collects what is not there yet and returns settings, counts and seconds."""

    def __init__(self, config: CollectConfig) -> None:
        if not 0 < config.val_episodes_per_task < config.episodes_per_task:
            raise ValueError(
                "val_episodes_per_task must lie between 0 and episodes_per_task, got "
                f"{config.val_episodes_per_task} of {config.episodes_per_task}"
            )
        if "default" not in config.noise or not all(config.noise.values()):
            raise ValueError(
                "noise needs a list of levels for 'default' and for every task it names, got "
                f"{config.noise}"
            )
        self._config = config
        self._launch = build(config.env, path="env")
        self._folder = Path(config.output) / config.name / config.version
        self._console = Console(stderr=True)

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        state = _read_json(self._folder / "collection.json")
        settings = self._settings()
        if state and (changed := _differences(state["settings"], settings)):
            raise ValueError(
                f"{self._folder} was begun with other settings ({changed}): set another version or "
                "name, or delete it"
            )
        if "tasks" in state:
            self._console.print(f"{self._folder} is complete already")
            return state
        try:
            with WorkerPool(self._launch) as pool:
                return self._collect(pool, settings, began)
        except KeyboardInterrupt:
            self._console.print("stopped; the same command continues the collection")
            sys.exit(130)

    def _collect(self, pool: WorkerPool, settings: dict[str, Any], began: float) -> dict[str, Any]:
        world = pool.call("describe")
        jobs = self._jobs(world["tasks"])
        look = pool.call("reset", task=jobs[0].task, start=0)
        with RldsWriter(
            self._config.output,
            name=self._config.name,
            version=self._config.version,
            features=_features(look, world["action_dim"], self._config.image_encoding),
            splits=("train", "val"),
            shards=self._config.shards,
            image_quality=self._config.image_quality,
        ) as writer:
            _write_json(self._folder / "collection.json", {"settings": settings})
            failed = self._folder / "failed.jsonl"
            dropped = set(failed.read_text().split()) if failed.exists() else set()
            todo = [job for job in jobs if job.key not in writer and job.key not in dropped]
            played = pool.map(todo, request=_request(self._config.hold), workers=self._workers())
            with self._progress() as progress:
                bar = progress.add_task(
                    "demonstrations",
                    total=len(jobs),
                    completed=len(jobs) - len(todo),
                    failed=len(dropped),
                )
                for number, (job, episode) in enumerate(played, start=len(jobs) - len(todo) + 1):
                    if episode["success"]:
                        writer.add_episode(job.split, _steps(episode), _metadata(job), key=job.key)
                    else:
                        dropped.add(job.key)
                        with failed.open("a") as file:
                            file.write(job.key + "\n")
                    progress.update(bar, advance=1, failed=len(dropped))
                    if not self._console.is_terminal and number % 50 == 0:
                        print(f"{number} of {len(jobs)} demonstrations", file=sys.stderr)
            counts = _counts(jobs, set(writer.keys()))
            writer.finish()
        seconds = round(time.monotonic() - began, 1)
        result = {"settings": settings, "tasks": counts, "seconds": seconds}
        _write_json(self._folder / "collection.json", result)
        self._report(counts, seconds)
        return result

    def _jobs(self, tasks: Mapping[str, Any]) -> list[Job]:
        """All demonstrations, start by start, so that a part of them is balanced too."""
        if unknown := sorted(set(self._config.noise) - set(tasks) - {"default"}):
            raise ValueError(f"noise names {unknown}, but the tasks are {sorted(tasks)}")
        jobs = []
        for start in range(self._config.episodes_per_task):
            for task in tasks:
                levels = self._config.noise.get(task, self._config.noise["default"])
                jobs.append(
                    Job(
                        task=task,
                        start=start,
                        split="val" if start < self._config.val_episodes_per_task else "train",
                        noise=levels[start % len(levels)],
                        displace=self._config.displace and start // len(levels) % 2 == 1,
                    )
                )
        return jobs

    def _settings(self) -> dict[str, Any]:
        """What decides the content of the dataset, as JSON gives it back."""
        settings = asdict(self._config)
        for key in ("_target_", "output", "workers"):
            del settings[key]
        settings["env"] = {
            k: v for k, v in settings["env"].items() if k in ("simulator", "options")
        }
        return json.loads(json.dumps(settings))

    def _workers(self) -> int:
        if self._config.workers is not None:
            return max(1, self._config.workers)
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed"),
            TimeRemainingColumn(),
            console=self._console,
        )

    def _report(self, counts: dict[str, dict[str, int]], seconds: float) -> None:
        table = Table("task", "train", "val", "failed", title=f"{self._folder}: {seconds:.0f} s")
        for task, count in counts.items():
            table.add_row(task, *(str(count[key]) for key in ("train", "val", "failed")))
        self._console.print(table)


def _features(
    look: Mapping[str, Any], action_dim: int, image_encoding: str
) -> dict[str, FeatureSpec]:
    """The layout of the common RLDS robot datasets, with the cameras as they look here."""
    images = {
        f"steps/observation/{name}": FeatureSpec.image(*image.shape[:2], encoding=image_encoding)
        for name, image in look["images"].items()
    }
    return images | {
        "steps/observation/state": FeatureSpec.tensor(look["state"].shape),
        "steps/action": FeatureSpec.tensor((action_dim,)),
        "steps/language_instruction": FeatureSpec.text(),
        "steps/is_first": FeatureSpec.scalar("bool"),
        "steps/is_last": FeatureSpec.scalar("bool"),
        "steps/is_terminal": FeatureSpec.scalar("bool"),
        "steps/reward": FeatureSpec.scalar(),
        "steps/discount": FeatureSpec.scalar(),
        "episode_metadata/task": FeatureSpec.text(),
        "episode_metadata/start": FeatureSpec.scalar("int64"),
        "episode_metadata/success": FeatureSpec.scalar("bool"),
        "episode_metadata/noise": FeatureSpec.scalar(),
        "episode_metadata/displaced": FeatureSpec.scalar("bool"),
    }


def _request(hold: int) -> Any:
    def request(job: Job) -> tuple[str, dict[str, Any]]:
        arguments = {
            "task": job.task,
            "start": job.start,
            "pool": "demo",
            "noise": job.noise,
            "displace": job.displace,
            "hold": hold,
        }
        return "demonstrate", arguments

    return request


def _steps(episode: Mapping[str, Any]) -> dict[str, Any]:
    recorded = episode["steps"]
    last = np.arange(len(recorded["action"])) == len(recorded["action"]) - 1
    return {
        "observation": {**recorded["images"], "state": recorded["state"]},
        "action": recorded["action"],
        "language_instruction": episode["text"],
        "is_terminal": last,
        "reward": last.astype(np.float32),
        "discount": np.float32(1.0),
    }


def _metadata(job: Job) -> dict[str, Any]:
    return {
        "task": job.task,
        "start": job.start,
        "success": True,
        "noise": np.float32(job.noise),
        "displaced": job.displace,
    }


def _counts(jobs: list[Job], stored: set[str]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for job in jobs:
        count = counts.setdefault(job.task, {"train": 0, "val": 0, "failed": 0})
        count[job.split if job.key in stored else "failed"] += 1
    return counts


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = dict(_leaves(before)), dict(_leaves(now))
    changed = [key for key in sorted(names[0] | names[1]) if names[0].get(key) != names[1].get(key)]
    return ", ".join(f"{key}: {names[0].get(key)} -> {names[1].get(key)}" for key in changed)


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=2) + "\n")
    os.replace(temporary, path)
