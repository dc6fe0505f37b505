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
from pizero.agent.weights.lerobot import write_processors
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
    lerobot  model.safetensors, config.json, and `statistics` as its processors keep them;
             `pipeline` tells how they normalise, as far as it is known
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
            if to == "openpi":
                _openpi_files(temporary, found, statistics, asset)
                report.notes = [*report.notes, *_openpi_otherwise(found.kind, pipeline or {})]
            else:
                write_processors(
                    temporary,
                    kind=found.kind,
                    model=found.model,
                    statistics=statistics,
                    pipeline=pipeline or {},
                )
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


def _openpi_otherwise(kind: str, pipeline: Mapping[str, Any]) -> list[str]:
    """What openpi's programs would do otherwise than the policy's pipeline: its folder says nothing
    of these."""
    usual, notes = {"pi0": "z_score", "pi05": "quantile"}[kind], []
    robot: Mapping[str, Any] = pipeline.get("robot") or {}
    rules = pipeline.get("normalization") or robot.get("normalization") or {}
    for name, rule in rules.items():
        trained = rule if isinstance(rule, str) else rule["kind"]
        if trained != usual:
            notes.append(
                f"openpi normalises the {name} of {kind} by {usual}, this does by {trained}"
            )
    mask = pipeline.get("delta_mask")
    if any((robot.get("delta_mask") if mask is None else mask) or ()):
        notes.append("actions are relative here: openpi's configuration has to say so too")
    return notes


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
