"""Results on paper: versions, statistics of timings, tables, and JSON written in one piece."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def versions() -> dict[str, str | None]:
    """What produced a number: packages, commit, and whether the tree had uncommitted changes."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "einops", "transformers", "lerobot"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    found["commit"] = _git("rev-parse", "--short=10", "HEAD")
    found["uncommitted changes"] = "yes" if _git("status", "--porcelain", "src", "bench") else "no"
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def clocks(device: torch.device) -> dict[str, int] | None:
    """Clock, power and temperature now; None where nothing can tell."""
    if device.type != "cuda":
        return None
    try:
        return {
            "sm_mhz": torch.cuda.clock_rate(device),
            "power_mw": torch.cuda.power_draw(device),
            "celsius": torch.cuda.temperature(device),
        }
    except (ModuleNotFoundError, RuntimeError):
        return None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the distance between the quartiles."""
    if len(values) == 1:
        return {"median": values[0], "iqr": 0.0}
    low, _, high = quantiles(values, n=4, method="inclusive")
    return {"median": median(values), "iqr": high - low}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others line up on the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def result_path(name: str, card: str) -> Path:
    """bench/results/<name>-<card>-<date>.json"""
    card = re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-")
    return RESULTS / f"{name}-{card}-{datetime.date.today().isoformat()}.json"


def _git(*arguments: str) -> str | None:
    done = subprocess.run(
        ("git", *arguments), cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None
