"""LeRobot's folders: config.json and the two processors beside the weights, read and written.

Classes that a processor file names are never imported: the steps' names and settings are read as
data, and a step that nothing here stands for is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pizero.data.stats import Statistics, save_statistics

BEFORE, AFTER = "policy_preprocessor", "policy_postprocessor"
_NORMALIZE, _UNNORMALIZE = "normalizer_processor", "unnormalizer_processor"
_RENAME = "rename_observations_processor"
_RELATIVE, _ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
_STATE_PROMPT = "pi05_prepare_state_tokenizer_processor_step"
# What the steps do is done by the pipeline or, for those that only move data, by nobody.
_KNOWN = {
    *(_NORMALIZE, _UNNORMALIZE, _RENAME, _RELATIVE, _ABSOLUTE, _STATE_PROMPT),
    "pi0_fast_prepare_state_tokenizer_processor_step",
    "pi0_new_line_processor",
    "tokenizer_processor",
    "action_tokenizer_processor",
    "to_batch_processor",
    "device_processor",
}
_MODES = {
    "IDENTITY": "identity",
    "MEAN_STD": "z_score",
    "MIN_MAX": "min_max",
    "QUANTILES": "quantile",
}
_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
_IMAGES = "observation.images."


@dataclass(frozen=True)
class Processors:
    """What a folder says of the pipeline. `delta_mask` is empty where actions are absolute."""

    statistics: Path | None
    cameras: tuple[str, ...]
    normalization: dict[str, dict[str, Any]]
    max_tokens: int | None
    delta_mask: tuple[bool, ...]

    def node(self) -> dict[str, Any]:
        """The arguments of a pipeline that they stand for."""
        node = {"normalization": self.normalization, "delta_mask": list(self.delta_mask)}
        if self.cameras:
            node["cameras"] = list(self.cameras)
        if self.max_tokens is not None:
            node["max_tokens"] = self.max_tokens
        return node


def read_processors(folder: Path) -> Processors | None:
    """Those of a folder, None where it has none. Raises ValueError for what is not understood."""
    path = folder / f"{BEFORE}.json"
    if not path.is_file():
        return None
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    before, after = _steps(path), _steps(folder / f"{AFTER}.json")
    features = config.get("input_features") or {}
    renamed = {new: old for old, new in before.get(_RENAME, {}).get("rename_map", {}).items()}
    cameras = [
        renamed.get(name, name).removeprefix(_IMAGES)
        for name, feature in features.items()
        # Empty ones are never there, and a picture that is not there changes nothing.
        if feature.get("type") == "VISUAL" and ".empty_camera_" not in name
    ]
    settings = before.get(_NORMALIZE, {})
    statistics, state = None, settings.get("state_file")
    if state is not None:
        statistics = folder / state
        if not statistics.is_file():
            raise ValueError(f"{path} names {state}, which is not there")
    modes = settings.get("norm_map") or config.get("normalization_mapping") or {}
    return Processors(
        statistics,
        tuple(cameras),
        {
            name: {
                "kind": _kind(folder, key, modes.get(key, "IDENTITY")),
                "epsilon": settings.get("eps", 1e-8),
                "min_scale": 0.0,
            }
            for name, key in (("state", "STATE"), ("action", "ACTION"))
        },
        config.get("tokenizer_max_length"),
        _relative(folder, before.get(_RELATIVE, {}), after.get(_ABSOLUTE, {}), config),
    )


def write_processors(
    folder: Path,
    *,
    kind: str,
    model: Mapping[str, Any],
    statistics: Mapping[str, Statistics] | None,
    pipeline: Mapping[str, Any],
) -> None:
    """config.json and the two processors of a pi0 or pi0.5, with the steps LeRobot's own have.

    `pipeline` are arguments of the policy's pipeline, as far as they are known; what is not is as
    LeRobot has it by default. Raises ValueError for a pipeline that its steps cannot stand for.
    """
    robot: Mapping[str, Any] = pipeline.get("robot") or {}
    modes = {"VISUAL": "IDENTITY", **_modes(kind, pipeline, robot)}
    side, width = model["vision"]["image_size"], model["action_dim"]
    sizes = {
        name: statistics[name].size if statistics and name in statistics else width
        for name in ("state", "action")
    }
    inputs = {
        f"{_IMAGES}{camera}": {"type": "VISUAL", "shape": [3, side, side]}
        for camera in pipeline.get("cameras") or robot.get("cameras") or _CAMERAS
    }
    inputs["observation.state"] = {"type": "STATE", "shape": [sizes["state"]]}
    outputs = {"action": {"type": "ACTION", "shape": [sizes["action"]]}}
    tokens = pipeline.get("max_tokens") or (48 if kind == "pi0" else 200)
    config: dict[str, Any] = {
        "type": kind,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": modes,
        "chunk_size": model["horizon"],
        "n_action_steps": model["horizon"],
        "max_state_dim": width,
        "max_action_dim": width,
        "image_resolution": [side, side],
        "tokenizer_max_length": tokens,
        "num_inference_steps": 10,
        "dtype": "float32",
        "device": "cpu",
    }
    words = _step(
        "tokenizer_processor",
        max_length=tokens,
        task_key="task",
        padding_side="right",
        padding="max_length",
        truncation=True,
        tokenizer_name="google/paligemma-3b-pt-224",
    )
    begin = [_step(_RENAME, rename_map={}), _step("to_batch_processor")]
    scale = _step(_NORMALIZE, eps=1e-8, features={**inputs, **outputs}, norm_map=modes)
    unscale = _step(_UNNORMALIZE, eps=1e-8, features=outputs, norm_map=modes)
    device = _step("device_processor", device="cpu")
    relative, absolute = [], []
    # Releases before 0.5.1 do not know these: they are written only where they do something.
    mask = pipeline.get("delta_mask")
    mask = list((robot.get("delta_mask") if mask is None else mask) or ())
    if any(mask):
        names = [f"action_{i:03d}" for i in range(sizes["action"])]
        kept = [name for name, moves in zip(names, mask, strict=False) if not moves]
        kept += names[len(mask) :]
        config |= {"use_relative_actions": True, "relative_exclude_joints": kept}
        config["action_feature_names"] = names
        relative = [_step(_RELATIVE, enabled=True, exclude_joints=kept, action_names=names)]
        absolute = [_step(_ABSOLUTE, enabled=True)]
    if kind == "pi0":
        before = [*begin, _step("pi0_new_line_processor"), words, device, *relative, scale]
    else:
        prompt = _step(_STATE_PROMPT, max_state_dim=width)
        before = [*begin, *relative, scale, prompt, words, device]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, steps, step in (
        (BEFORE, before, scale),
        (AFTER, [unscale, *absolute, device], unscale),
    ):
        if statistics is not None:
            state = f"{name}_step_{steps.index(step)}_{step['registry_name']}.safetensors"
            step["state_file"] = state
            save_statistics(statistics, folder / state, dialect="lerobot_processor")
        tree = {"name": name, "steps": steps}
        (folder / f"{name}.json").write_text(json.dumps(tree, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; ValueError where it is none."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _step(name: str, **settings: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": settings}


def _steps(path: Path) -> dict[str, dict[str, Any]]:
    """Settings by registered name; ValueError for a step that would be left out."""
    found: dict[str, dict[str, Any]] = {}
    for step in read_json(path).get("steps", []) if path.is_file() else []:
        name = step.get("registry_name") or step.get("class")
        if name not in _KNOWN:
            raise ValueError(
                f"{path} has a step {name!r}, and a policy here would not do what it does; known "
                f"are {sorted(_KNOWN)}"
            )
        found[name] = {**(step.get("config") or {}), "state_file": step.get("state_file")}
    return found


def _kind(folder: Path, key: str, mode: str) -> str:
    if mode not in _MODES:
        raise ValueError(
            f"{folder}: normalisation {mode!r} of {key} is not known; known: {list(_MODES)}"
        )
    return _MODES[mode]


def _relative(
    folder: Path,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    config: Mapping[str, Any],
) -> tuple[bool, ...]:
    """Which dimensions are relative: all but those whose name has an excluded word in it."""
    both = [bool(settings.get("enabled")) for settings in (before, after)]
    if both[0] != both[1]:
        raise ValueError(
            f"{folder}: expected {_RELATIVE} and {_ABSOLUTE} to be enabled both or neither, got "
            f"{both[0]} and {both[1]}"
        )
    if not both[0]:
        return ()
    action: Mapping[str, Any] = (config.get("output_features") or {}).get("action") or {}
    if not action.get("shape"):
        raise ValueError(f"{folder / 'config.json'} lacks the shape of the action")
    size = action["shape"][0]
    names: Sequence[str] = before.get("action_names") or config.get("action_feature_names") or ()
    words = [str(word).lower() for word in before.get("exclude_joints") or () if word]
    mask = [not any(word in str(name).lower() for word in words) for name in names[:size]]
    return (*mask, *[True] * (size - len(mask)))


def _modes(kind: str, pipeline: Mapping[str, Any], robot: Mapping[str, Any]) -> dict[str, str]:
    """LeRobot's names of a pipeline's normalisation."""
    default = "MEAN_STD" if kind == "pi0" else "QUANTILES"
    rules, wrong = pipeline.get("normalization") or robot.get("normalization") or {}, []
    modes = {}
    for name, key in (("state", "STATE"), ("action", "ACTION")):
        rule = rules.get(name, _MODES[default])
        rule = {"kind": rule} if isinstance(rule, str) else dict(rule)
        modes[key] = next(mode for mode, ours in _MODES.items() if ours == rule["kind"])
        if rule["kind"] == "identity":
            continue
        if not all(rule.get("mask") or ()):
            wrong.append(f"a mask on {name}")
        if rule.get("clip") is not None:
            wrong.append(f"clipped {name}")
        if list(rule.get("bounds") or (-1.0, 1.0)) != [-1.0, 1.0]:
            wrong.append(f"bounds {rule['bounds']} of {name}")
    wrong += [f"the robot's {part}" for part in ("state_maps", "action_maps") if robot.get(part)]
    if wrong:
        raise ValueError(
            "this policy cannot be written for LeRobot, whose processors have no step for "
            + ", ".join(wrong)
        )
    return modes
