"""What lies beside foreign weights for the pipeline: statistics, normalisation, cameras, tokenizer.

openpi keeps `assets/<robot>/norm_stats.json`; LeRobot the state of its processors; our own folders
`stats.json`. Classes that a processor file names are never imported: the steps' names and settings
are read as data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENIZERS = ("tokenizer.model", "paligemma_tokenizer.model")
_PREPROCESSOR = "policy_preprocessor.json"
_NORMALIZER = "normalizer_processor"
_MODES = {
    "IDENTITY": "identity",
    "MEAN_STD": "z_score",
    "MIN_MAX": "min_max",
    "QUANTILES": "quantile",
}


@dataclass(frozen=True)
class Assets:
    """What was found; None where nothing was."""

    statistics: Path | None = None
    tokenizer: Path | None = None
    cameras: tuple[str, ...] | None = None
    normalization: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_tokens: int | None = None


def find_assets(path: Path, *, asset: str | None = None) -> Assets:
    """The assets of a checkpoint at `path`, a file or folder.

    `asset` chooses among several robots' statistics. Raises ValueError where there are several and
    none is chosen.
    """
    folder = path if path.is_dir() else path.parent
    # Orbax weights lie in `params`, assets beside it.
    roots = [folder, folder.parent] if folder.name == "params" else [folder]
    tokenizer = next((r / n for r in roots for n in TOKENIZERS if (r / n).is_file()), None)
    if (folder / _PREPROCESSOR).is_file():
        return _lerobot(folder, tokenizer)
    for root in roots:
        if (root / "assets").is_dir():
            return Assets(_chosen(root / "assets", asset), tokenizer)
        for name in ("stats.json", "norm_stats.json"):
            if (root / name).is_file():
                return Assets(root / name, tokenizer)
    return Assets(None, tokenizer)


def _chosen(folder: Path, asset: str | None) -> Path | None:
    """openpi's statistics of the robot called `asset`; its name may have several parts."""
    found = {str(p.parent.relative_to(folder)): p for p in sorted(folder.rglob("norm_stats.json"))}
    if asset is not None:
        if asset not in found:
            raise ValueError(f"no statistics {asset!r} in {folder}: found {sorted(found)}")
        return found[asset]
    if len(found) > 1:
        raise ValueError(f"{folder} has statistics of {sorted(found)}: choose one with asset=...")
    return next(iter(found.values()), None)


def _lerobot(folder: Path, tokenizer: Path | None) -> Assets:
    """LeRobot's processors: one step normalises, and keeps its statistics in a file of its own."""
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    steps = _json(folder / _PREPROCESSOR).get("steps", [])
    found = [s for s in steps if s.get("registry_name") == _NORMALIZER]
    features = config.get("input_features") or {}
    cameras = tuple(n for n, f in features.items() if f.get("type") == "VISUAL")
    modes: Mapping[str, str] = config.get("normalization_mapping") or {}
    statistics, epsilon = None, 1e-8
    if found:
        settings = found[0].get("config", {})
        modes = settings.get("norm_map") or modes
        epsilon = settings.get("eps", epsilon)
        state = found[0].get("state_file")
        statistics = folder / state if state else None
        if statistics is not None and not statistics.is_file():
            raise ValueError(f"{folder / _PREPROCESSOR} names {state}, which is not there")
    normalization = {}
    for name, key in (("state", "STATE"), ("action", "ACTION")):
        mode = modes.get(key, "IDENTITY")
        if mode not in _MODES:
            raise ValueError(
                f"{folder}: normalisation {mode!r} of {key} is not known; known: {list(_MODES)}"
            )
        normalization[name] = {"kind": _MODES[mode], "epsilon": epsilon, "min_scale": 0.0}
    return Assets(
        statistics,
        tokenizer,
        cameras or None,
        normalization,
        config.get("tokenizer_max_length"),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
