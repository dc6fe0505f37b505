"""What lies beside foreign weights for the pipeline: statistics, processors, tokenizer.

openpi keeps `assets/<robot>/norm_stats.json`; LeRobot the state of its processors (lerobot.py); our
own folders `stats.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pizero.agent.weights.lerobot import Processors, read_processors

TOKENIZERS = ("tokenizer.model", "paligemma_tokenizer.model")


@dataclass(frozen=True)
class Assets:
    """What was found; None where nothing was."""

    statistics: Path | None = None
    tokenizer: Path | None = None
    processors: Processors | None = None


def find_assets(path: Path, *, asset: str | None = None) -> Assets:
    """The assets of a checkpoint at `path`, a file or folder.

    `asset` chooses among several robots' statistics. Raises ValueError where there are several and
    none is chosen.
    """
    folder = path if path.is_dir() else path.parent
    # Orbax weights lie in `params`, assets beside it.
    roots = [folder, folder.parent] if folder.name == "params" else [folder]
    tokenizer = next((r / n for r in roots for n in TOKENIZERS if (r / n).is_file()), None)
    if (processors := read_processors(folder)) is not None:
        return Assets(processors.statistics, tokenizer, processors)
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
