"""pizero's own checkpoint folder: where it is, and what it says of itself.

A folder describes itself: `config.yaml` with the nodes of model and pipeline, `metadata.json` with
the same nodes and the digests of the other files, so parts that do not belong together are noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from pizero.data.fast_tokenizer import FILES as FAST_FILES

FORMAT = 1
WEIGHTS = "model.safetensors"
UNREAD = "unread.safetensors"  # tensors of other layouts that a policy does not read
# What the pipeline learnt from the data, and the tokenizer of actions that are spelt.
FILES = ("stats.json", "tokenizer.model", *FAST_FILES)
PREFIX = "step_"


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of a run."""
    path = Path(path)
    for folder in (path, path / "latest", path / "checkpoints" / "latest"):
        if (folder / "metadata.json").is_file():
            return folder.resolve()
    if newest := newest_checkpoint(path / "checkpoints"):
        return newest
    raise FileNotFoundError(
        f"no checkpoint at {path}: expected a folder with metadata.json and model.safetensors, "
        "or a run folder with checkpoints/"
    )


def own_folder(path: str | Path) -> Path | None:
    """The checkpoint folder of ours that `path` means; None where it means something else."""
    try:
        return find_checkpoint(path)
    except FileNotFoundError:
        return None


def has_pipeline(path: str | Path) -> bool:
    """Whether `path` is a checkpoint of ours that is a whole policy and not weights alone."""
    folder = own_folder(path)
    if folder is None:
        return False
    return json.loads((folder / "metadata.json").read_text()).get("pipeline") is not None


def newest_checkpoint(root: Path) -> Path | None:
    """The folder of the largest step under `root`; a folder with this name is always whole."""
    folders = checkpoints(root)
    return folders[-1] if folders else None


def checkpoints(root: Path) -> list[Path]:
    """All checkpoint folders under `root`, oldest first."""
    return sorted(root.glob(f"{PREFIX}*")) if root.is_dir() else []


def read_description(folder: Path) -> tuple[DictConfig, dict[str, Any]]:
    """A checkpoint's configuration and metadata, after checking that its parts agree."""
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    metadata = json.loads((folder / "metadata.json").read_text())
    if metadata["format"] != FORMAT:
        raise ValueError(f"{folder} has format {metadata['format']}, this version reads {FORMAT}")
    nodes = OmegaConf.to_container(config)
    assert isinstance(nodes, dict)
    wrong = [
        f"{key} is {was!r} in metadata.json and {now!r} in config.yaml"
        for part in ("model", "pipeline", "pipelines")
        for key, was, now in differences(metadata.get(part), nodes.get(part), part)
    ]
    wrong += [
        f"{name} had digest {was} when it was saved and has {digest(folder / name)} now"
        for name, was in metadata["files"].items()
        if digest(folder / name) != was
    ]
    if wrong:
        raise ValueError(f"the parts of {folder} do not belong together: " + "; ".join(wrong))
    return config, metadata


def write_description(
    folder: Path,
    config: str,
    *,
    step: int,
    samples: int,
    weights: str,
    parameters: int,
    **more: Any,
) -> None:
    """Write config.yaml and metadata.json into a folder that holds FILES already.

    `config` is YAML with the nodes `model` and `pipeline`; `weights` says whose the weights are.
    """
    (folder / "config.yaml").write_text(config)
    nodes = OmegaConf.to_container(OmegaConf.create(config))
    assert isinstance(nodes, dict)
    metadata = {
        "format": FORMAT,
        "step": step,
        "samples": samples,
        "weights": weights,
        "parameters": parameters,
        "model": nodes["model"],
        "pipeline": nodes["pipeline"],
        **({} if nodes.get("pipelines") is None else {"pipelines": nodes["pipelines"]}),
        "files": {name: digest(folder / name) for name in FILES if (folder / name).exists()},
        **more,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def model_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, each tensor once even where modules share it."""
    seen: set[int] = set()
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor.detach()
    return weights


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys at which two plain trees differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{path}.{key}" if path else str(key)
            found += differences(old.get(key), new.get(key), inner)
        return found
    return [] if old == new else [(path, old, new)]


def digest(path: Path) -> str | None:
    """A short fingerprint of a file; None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None
