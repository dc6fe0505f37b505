"""Deciding whether a run continues: which checkpoint, and whether it is still the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pizero.agent.checkpoint import step_of
from pizero.agent.config import Resume, TrainConfig, to_yaml
from pizero.agent.weights.folder import differences, newest_checkpoint, read_description

# Keys that may differ between two sittings of one run: where and how fast it runs, what it says
# and keeps. Splitting a batch otherwise, or another device, changes rounding and nothing else.
FREE = (
    "name",
    "run_dir",
    "data.workers",
    "micro_batch_size",
    "device",
    "compile",
    "threads",
    "validate",
    "checkpoint",
    "log_every",
    "max_minutes",
    "resume",
    "tracker",
)


def checkpoint_to_continue(config: TrainConfig, root: Path) -> Path | None:
    """The checkpoint from which this run goes on, or None to begin.

    Refuses to continue with a configuration that gives another run, naming each key and both
    values; and to begin in a folder that already holds checkpoints.
    """
    newest = newest_checkpoint(root)
    if newest is None:
        return None
    step = step_of(newest)
    if config.resume is Resume.never:
        raise ValueError(
            f"{root} already holds a run at step {step}, and resume=never asks to begin anew: "
            "choose another run_dir, or delete that folder"
        )
    before, _ = read_description(newest)
    if config.resume is Resume.auto:
        now = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
        refuse_changes(OmegaConf.to_container(before), now, step)
    return newest


def refuse_changes(before: Any, now: Any, step: int) -> None:
    """Raise if two resolved configurations would give different runs."""
    changed = [
        f"{key}: {old!r} then, {new!r} now"
        for key, old, new in differences(before, now)
        if not any(key == free or key.startswith(f"{free}.") for free in FREE)
    ]
    if changed:
        raise ValueError(
            f"this run folder is at step {step} of a run with another configuration:\n  "
            + "\n  ".join(changed)
            + "\nGive another run_dir to begin a new run, or resume=changed to go on all the same"
        )


def refuse_other_data(before: Any, now: Any) -> None:
    """Raise if the data sets are not those the run began with."""
    changed = [f"{key}: {old!r} then, {new!r} now" for key, old, new in differences(before, now)]
    if changed:
        raise ValueError(
            "the data has changed since this run began:\n  "
            + "\n  ".join(changed)
            + "\nGive another run_dir to begin a new run, or resume=changed to go on all the same"
        )
