"""Checkpoint folders from any published checkpoint: ours, openpi's PyTorch one, LeRobot's.

A folder is written under another name and renamed when it is whole. Tensors pass one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pizero.agent.config import build
from pizero.agent.machine import versions
from pizero.agent.weights.convert import OpenpiSource, Ours, in_reading_order
from pizero.agent.weights.folder import FILES, UNREAD, WEIGHTS, model_weights, write_description
from pizero.agent.weights.inspect import Found
from pizero.agent.weights.load import check
from pizero.agent.weights.report import LoadReport, expert_of
from pizero.agent.weights.source import Entry
from pizero.agent.weights.write import write_safetensors
from pizero.data.stats import Statistics, save_statistics

LAYOUTS = ("pizero", "openpi", "lerobot")
_PUBLISHED = {(2048, 18, 16384): "gemma_2b", (1024, 18, 4096): "gemma_300m"}


def export(
    found: Found,
    destination: str | Path,
    *,
    to: str = "pizero",
    dtype: torch.dtype | None = None,
    pipeline: Mapping[str, Any] | None = None,
    files: Path | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    asset: str = "robot",
) -> LoadReport:
    """Write a checkpoint folder, and tell what went into it.

    pizero   `pipeline` is the resolved node of the policy's pipeline and `files` the folder with
             its statistics and tokenizer; without them the folder holds weights only. Tensors that
             a policy does not read are kept in a file of their own, for the way back.
    openpi   model.safetensors, config.json, and `statistics` below assets/`asset`
    lerobot  model.safetensors, config.json, and `statistics` as its processors keep them
    """
    if to not in LAYOUTS:
        raise ValueError(f"expected a layout of {', '.join(LAYOUTS)}, got {to!r}")
    destination = Path(destination)
    if destination.exists():
        raise FileExistsError(f"{destination} is there already; name a new folder")
    with torch.device("meta"):
        model = build(found.model, path="model", packages=("pizero",))
    own = model_weights(model)
    report = check(own, found)
    temporary = destination.with_name(f".writing_{destination.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if to == "pizero":
            squares = _write_own(temporary, found, own, report, dtype, pipeline, files)
        else:
            squares = _write_openpi(temporary, found, report, dtype)
            extra = _openpi_files if to == "openpi" else _lerobot_files
            extra(temporary, found, statistics, asset)
        for name in own:
            report.experts[expert_of(name)].squares += squares[name]
        temporary.rename(destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return report


def _write_own(
    folder: Path,
    found: Found,
    own: Mapping[str, torch.Tensor],
    report: LoadReport,
    dtype: torch.dtype | None,
    pipeline: Mapping[str, Any] | None,
    files: Path | None,
) -> Mapping[str, float]:
    ours = Ours(found, dtype=dtype)

    parts: tuple[dict[str, Entry], dict[str, Entry]] = ({}, {})
    for name, entry in ours.entries.items():
        parts[name not in own][name] = entry
    for name, entries in zip((WEIGHTS, UNREAD), parts, strict=True):
        if entries:
            write_safetensors(folder / name, entries, ours.read)
    for name in FILES:
        if files is not None and (files / name).is_file():
            shutil.copyfile(files / name, folder / name)
    config = {"model": found.model, "pipeline": None if pipeline is None else dict(pipeline)}
    write_description(
        folder,
        OmegaConf.to_yaml(OmegaConf.create(config)),
        step=0,
        samples=0,
        weights=f"converted from {found.layout}",
        parameters=report.parameters,
        data={},
        versions=versions(),
    )
    return ours.squares


def _write_openpi(
    folder: Path, found: Found, report: LoadReport, dtype: torch.dtype | None
) -> Mapping[str, float]:
    source = OpenpiSource(found, dtype=dtype)
    write_safetensors(folder / WEIGHTS, in_reading_order(source), source.read)
    report.notes = [
        *report.notes,
        f"zeros stand for {len(source.filled)} tensors that nothing reads and the original lacks "
        f"({source.filled[-1]}, ...)",
    ]
    return source.ours.squares


def _openpi_files(
    folder: Path, found: Found, statistics: Mapping[str, Statistics] | None, asset: str
) -> None:
    node, mixtures = found.model, found.model["joint"]["mixtures"]
    sizes = {n: (m["width"], m["depth"], m["mlp_dim"]) for n, m in mixtures.items()}
    stored = {e.dtype for e in found.source.entries.values()}
    tree = {
        "action_dim": node["action_dim"],
        "action_horizon": node["horizon"],
        "paligemma_variant": _PUBLISHED.get(sizes["vlm"]),
        "action_expert_variant": _PUBLISHED.get(sizes["action"]),
        "precision": "bfloat16" if torch.bfloat16 in stored else "float32",
    }
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
    if statistics is not None:
        path = folder / "assets" / asset / "norm_stats.json"
        path.parent.mkdir(parents=True)
        save_statistics(statistics, path, dialect="openpi")


def _lerobot_files(
    folder: Path, found: Found, statistics: Mapping[str, Statistics] | None, asset: str
) -> None:
    """config.json and the two processors, with the steps LeRobot's own have."""
    node, kind = found.model, found.kind
    mode = "MEAN_STD" if kind == "pi0" else "QUANTILES"
    modes = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    side = node["vision"]["image_size"]
    sizes = {
        name: statistics[name].size if statistics and name in statistics else node["action_dim"]
        for name in ("state", "action")
    }
    inputs = {
        f"observation.images.{camera}": {"type": "VISUAL", "shape": [3, side, side]}
        for camera in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    }
    inputs["observation.state"] = {"type": "STATE", "shape": [sizes["state"]]}
    outputs = {"action": {"type": "ACTION", "shape": [sizes["action"]]}}
    tokens = 48 if kind == "pi0" else 200
    config = {
        "type": kind,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": modes,
        "chunk_size": node["horizon"],
        "n_action_steps": node["horizon"],
        "max_state_dim": node["action_dim"],
        "max_action_dim": node["action_dim"],
        "image_resolution": [side, side],
        "tokenizer_max_length": tokens,
        "num_inference_steps": 10,
        "dtype": "float32",
        "device": "cpu",
    }
    words = {
        "registry_name": "tokenizer_processor",
        "config": {
            "max_length": tokens,
            "task_key": "task",
            "padding_side": "right",
            "padding": "max_length",
            "truncation": True,
            "tokenizer_name": "google/paligemma-3b-pt-224",
        },
    }
    normalizer = {"eps": 1e-8, "features": {**inputs, **outputs}, "norm_map": modes}
    device = {"registry_name": "device_processor", "config": {"device": "cpu"}}
    begin = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
    ]
    normalize = {"registry_name": "normalizer_processor", "config": normalizer}
    if kind == "pi0":
        newline = {"registry_name": "pi0_new_line_processor", "config": {}}
        before = [*begin, newline, words, device, normalize]
    else:
        prompt = {
            "registry_name": "pi05_prepare_state_tokenizer_processor_step",
            "config": {"max_state_dim": node["action_dim"]},
        }
        before = [*begin, normalize, prompt, words, device]
    back = {"eps": 1e-8, "features": outputs, "norm_map": modes}
    unnormalize = {"registry_name": "unnormalizer_processor", "config": back}
    after = [unnormalize, device]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, steps, step in (
        ("policy_preprocessor", before, normalize),
        ("policy_postprocessor", after, unnormalize),
    ):
        if statistics is not None:
            state = f"{name}_step_{steps.index(step)}_{step['registry_name']}.safetensors"
            step["state_file"] = state
            save_statistics(statistics, folder / state, dialect="lerobot_processor")
        tree = {"name": name, "steps": steps}
        (folder / f"{name}.json").write_text(json.dumps(tree, indent=2) + "\n")
