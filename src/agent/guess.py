"""Which keys of a data set are pictures, state, action and instruction, where nobody says so.

Names are looked at, never values. What was guessed is shown to the user, who can say otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pizero.data.robot import Robot

STATES = ("observation/state", "observation/proprio", "observation.state", "state")
ACTIONS = ("action", "actions")
TEXTS = (
    "language_instruction",
    "observation/natural_language_instruction",
    "observation/language_instruction",
    "task",
)


@dataclass(frozen=True)
class Feature:
    """One key of the steps, whatever the format: kind is image, text, tensor or another."""

    kind: str
    dtype: str
    shape: tuple[int, ...]


Features = Mapping[str, Feature]


def guess_cameras(features: Features, robot: Robot | None = None) -> dict[str, str]:
    """Colour pictures by the last word of their keys; under a robot's names where they fit."""
    pictures = [key for key, f in features.items() if f.kind == "image" and not _is_depth(key, f)]
    short = [re.split(r"[/.]", key)[-1] for key in pictures]
    names = [s if short.count(s) == 1 else key for s, key in zip(short, pictures, strict=True)]
    if robot is not None:
        slots = {name: slot for slot, known in robot.cameras.items() for name in (*known, slot)}
        fitting = {slots[n]: key for n, key in zip(names, pictures, strict=True) if n in slots}
        if fitting:
            return fitting
    return dict(sorted(zip(names, pictures, strict=True)))


def guess_state(features: Features) -> list[str]:
    """The keys that make the state; empty if none is called like one."""
    if usual := [key for key in STATES if key in features]:
        return usual[:1]
    words = ("state", "proprio", "joint", "pose", "gripper")
    return [
        key
        for key, feature in features.items()
        if key.startswith("observation/")
        and _is_vector(feature)
        and any(word in key.rsplit("/", 1)[-1] for word in words)
    ]


def guess_action(features: Features, directory: Path) -> list[str]:
    """The keys that make the action; ValueError, with what there is, if none is called like one."""
    if usual := [key for key in ACTIONS if key in features]:
        return usual[:1]
    vectors = [key for key, feature in features.items() if _is_vector(feature)]
    if parts := [key for key in vectors if key.startswith(("action/", "actions/", "action."))]:
        return parts
    raise ValueError(
        f"{directory} has no {' or '.join(ACTIONS)}: name the keys that make the action with "
        f"--action. It has: {', '.join(vectors) or 'no vectors'}"
    )


def guess_text(features: Features) -> str | None:
    """The key of the instruction; None if there is none."""
    if usual := [key for key in TEXTS if key in features]:
        return usual[0]
    texts = [key for key, feature in features.items() if feature.kind == "text"]
    return next((k for k in texts if "instruction" in k or "language" in k), None)


def _is_depth(key: str, feature: Feature) -> bool:
    return "depth" in key or (bool(feature.shape) and 3 not in feature.shape)


def _is_vector(feature: Feature) -> bool:
    is_small = len(feature.shape) <= 1 and -1 not in feature.shape
    return feature.kind == "tensor" and feature.dtype.startswith("float") and is_small
