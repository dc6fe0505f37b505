"""Checkpoints: folders that describe themselves and are either whole or absent.

    <run>/checkpoints/step_00001234/
        model.safetensors  the weights to use: the average, or without one the trained weights
        config.yaml        the run's resolved configuration, with `model` and `pipeline`
        stats.json  tokenizer.model  metadata.json, and pi0-FAST's files of action tokens
        training/          what only a resumed run needs: trained weights, optimizer state
    <run>/checkpoints/latest -> step_00001234

A folder is written under another name, forced to the disk and renamed, so a process killed at any
moment leaves nothing that looks like a checkpoint and is not one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from pizero.agent.config import build
from pizero.agent.machine import versions
from pizero.agent.training.ema import WeightAverage
from pizero.agent.training.optim import load_optimizer_state, optimizer_state
from pizero.agent.weights import load_model
from pizero.agent.weights.folder import (
    FAST_FILES,
    FILES,
    PREFIX,
    WEIGHTS,
    checkpoints,
    find_checkpoint,
    model_weights,
    read_description,
    write_description,
)
from pizero.data.normalize import expect_one_of
from pizero.data.stats import load_statistics, statistics_names

if TYPE_CHECKING:
    from pizero.data.pipeline import PolicyPipeline
    from pizero.model import PiZero

_WRITING, _DELETING = ".writing_", ".deleting_"


def save_checkpoint(
    root: Path,
    *,
    step: int,
    samples: int,
    config: str,
    model: nn.Module,
    average: WeightAverage | None,
    optimizer: torch.optim.Optimizer,
    files: Path,
    data: Mapping[str, Any],
) -> Path:
    """Write `root/step_...` and point `latest` at it; returns the folder.

    `config` is the resolved configuration as YAML, `files` the folder with stats.json and
    tokenizer.model, `data` a description of the data sets to compare on resuming.
    """
    final = root / f"{PREFIX}{step:08d}"
    if not final.exists():
        folder = root / f"{_WRITING}{final.name}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "training").mkdir(parents=True)
        _write_weights(folder, model, average)
        _write_optimizer(folder, model, optimizer)
        for name in FILES:
            if (files / name).exists():
                shutil.copyfile(files / name, folder / name)
        write_description(
            folder,
            config,
            step=step,
            samples=samples,
            weights="raw" if average is None else "average",
            parameters=sum(p.numel() for p in model.parameters()),
            data=dict(data),
            versions=_versions(),
        )
        for path in (*folder.rglob("*"), folder):
            _force_to_disk(path)
        folder.rename(final)
        _force_to_disk(root)
    _point_latest(root, final)
    return final


def load_checkpoint(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packages: Sequence[str] = ("pizero",),
    dataset: str | None = None,
) -> tuple[DictConfig, PiZero, PolicyPipeline, dict[str, Any]]:
    """Configuration, model with its weights, pipeline and metadata, from the folder alone.

    `path` is a checkpoint or the run folder it lies in (then the newest). `dataset` names one of
    the mix, where each has a pipeline of its own. Refuses a folder whose
    parts do not belong together, with both values. Only classes from `packages` are built, as a
    configuration can name any code: add your own package if you trust the folder.
    """
    folder = find_checkpoint(path)
    config, metadata = read_description(folder)
    model = load_model(folder, device=device, dtype=dtype, packages=packages).model
    pipeline = build_pipeline(config, folder, dataset=dataset, packages=packages)
    return config, model, pipeline, metadata


def step_of(folder: Path) -> int:
    """The step a checkpoint folder's name tells."""
    return int(folder.name.removeprefix(PREFIX))


def build_pipeline(
    config: Any, folder: Path, *, dataset: str | None = None, packages: Sequence[str] | None = None
) -> PolicyPipeline:
    """The configured pipeline, with the statistics and the tokenizers that lie in `folder`.

    `config` is a run's, resolved. `dataset` says which one, where each data set has its own.
    """
    node, own = _plain(config.pipeline), pipelines_of(config)
    statistics: Any = folder / "stats.json"
    if own is not None:
        names = statistics_names(statistics)
        if dataset is None and len(names) == 1:
            dataset = names[0]
        if dataset is None:
            raise ValueError(
                f"{folder} has a pipeline for each of {', '.join(names)}; name one (dataset=)"
            )
        expect_one_of("dataset", dataset, names)
        node = {**node, **own.get(dataset, {})}
        statistics = load_statistics(statistics, dataset=dataset)
    elif dataset is not None:
        raise ValueError(f"{folder} has one pipeline for all data; dataset {dataset!r} is not told")
    files = {"statistics": statistics, "tokenizer": folder / "tokenizer.model"}
    if all((folder / name).is_file() for name in FAST_FILES):
        files["action_tokenizer"] = folder
    return build(node, path="pipeline", packages=packages, **files)


def pipelines_of(config: Any) -> dict[str, dict[str, Any]] | None:
    """What each data set of a mix changes in the pipeline; None: one pipeline for all."""
    own = _plain(config.get("pipelines") if isinstance(config, Mapping) else config.pipelines)
    return None if own is None else {name: changes or {} for name, changes in own.items()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: Any) -> None:
    """Copy `weights` into `model`. Refuses any name or shape that differs, listing both sides."""
    own = model_weights(model)
    wrong = [f"{name}: in {source} only" for name in weights if name not in own]
    wrong += [f"{name}: in the model only" for name in own if name not in weights]
    wrong += [
        f"{name}: {list(weights[name].shape)} in {source}, {list(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        shown = "\n  ".join(wrong[:20]) + ("\n  ..." if len(wrong) > 20 else "")
        raise ValueError(f"{len(wrong)} weights do not fit:\n  {shown}")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def load_training_state(
    folder: Path,
    *,
    model: nn.Module,
    average: WeightAverage | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put a run back exactly where it was when `folder` was written."""
    weights = load_file(folder / WEIGHTS)
    raw = folder / "training" / "weights.safetensors"
    load_weights(model, weights | (load_file(raw) if raw.exists() else {}), folder)
    if average is not None:
        average.load(weights)
    state = json.loads((folder / "training" / "optimizer.json").read_text())
    tensors = load_file(folder / "training" / "optimizer.safetensors")
    load_optimizer_state(optimizer, _names(model), tensors, state)


def prune(root: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Delete checkpoints except the last few and those at multiples of `keep_every`."""
    for folder in checkpoints(root)[:-keep_last]:
        if keep_every is None or step_of(folder) % keep_every:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = root / f"{_DELETING}{folder.name}"
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for pattern in (f"{_WRITING}*", f"{_DELETING}*"):
        for folder in root.glob(pattern):
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder)


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node


def _write_weights(folder: Path, model: nn.Module, average: WeightAverage | None) -> None:
    weights = model_weights(model)
    if average is not None:
        raw = {name: weights[name] for name in average.average}
        _save(raw, folder / "training" / "weights.safetensors")
        weights |= average.average
    _save(weights, folder / WEIGHTS)


def _write_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors, state = optimizer_state(optimizer, _names(model))
    _save(tensors, folder / "training" / "optimizer.safetensors")
    (folder / "training" / "optimizer.json").write_text(json.dumps(state, sort_keys=True) + "\n")


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _point_latest(root: Path, folder: Path) -> None:
    link = root / f"{_WRITING}latest"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(root / "latest")


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@cache
def _versions() -> dict[str, str]:
    """Asking git takes a while, and the code that runs stays what it was when it was loaded."""
    return versions()
