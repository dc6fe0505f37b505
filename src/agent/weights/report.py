"""What loading a checkpoint did, expert by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pizero.agent.weights.links import LeftOut

_PART = 1 << 15  # numbers whose sum of squares is taken at once: in a cache, and without threads


@dataclass
class ExpertReport:
    """Tensors of one expert by what became of them; parameters, stored dtypes, Frobenius norm."""

    loaded: int = 0  # under the same name
    renamed: int = 0
    merged: int = 0  # several stored tensors in one of ours
    initialised: int = 0
    parameters: int = 0
    dtypes: set[torch.dtype] = field(default_factory=set)
    squares: float = 0.0

    @property
    def norm(self) -> float:
        return self.squares**0.5


@dataclass
class LoadReport:
    """The record of one load; `str()` of it is a table for people."""

    source: Path
    layout: str
    kind: str
    experts: dict[str, ExpertReport] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    left_out_parameters: int = 0
    initialised: list[str] = field(default_factory=list)
    adapted: int = 0
    notes: Sequence[str] = ()

    @property
    def parameters(self) -> int:
        return sum(e.parameters for e in self.experts.values())

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        experts = {
            name: {
                "loaded": e.loaded,
                "renamed": e.renamed,
                "merged": e.merged,
                "initialised": e.initialised,
                "parameters": e.parameters,
                "dtypes": sorted(str(d).removeprefix("torch.") for d in e.dtypes),
                "norm": e.norm,
            }
            for name, e in self.experts.items()
        }
        return {
            "layout": self.layout,
            "kind": self.kind,
            "parameters": self.parameters,
            "experts": experts,
            "left_out": {x.theirs: x.reason for x in self.left_out},
            "lora_merged": self.adapted,
            "initialised": self.initialised,
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=f"{self.kind} from {self.source} ({self.layout})", title_justify="left")
        table.add_column("expert")
        fates = ["loaded", "renamed", "merged", *["initialised"] * bool(self.initialised)]
        for name in (*fates, "parameters", "norm"):
            table.add_column(name, justify="right")
        table.add_column("stored as")
        for name, e in self.experts.items():
            counts = [str(getattr(e, fate)) for fate in fates]
            dtypes = ", ".join(sorted(str(d).removeprefix("torch.") for d in e.dtypes))
            table.add_row(name, *counts, f"{e.parameters:,}", f"{e.norm:.6g}", dtypes)
        return table

    def remarks(self) -> list[str]:
        """Lines below the table: what was left out and why, initialised, merged, assumed."""
        lines = []
        reasons: dict[str, list[str]] = {}
        for x in self.left_out:
            reasons.setdefault(x.reason, []).append(x.theirs)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left out: {names[0]}{more} ({reason})")
        if self.adapted:
            lines.append(f"merged: the LoRA deltas of {self.adapted} stored tensors")
        if self.initialised:
            names = ", ".join(self.initialised[:3]) + (", ..." if len(self.initialised) > 3 else "")
            lines.append(f"initialised, not loaded: {len(self.initialised)} tensors ({names})")
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
            for line in self.remarks():
                console.print(line, soft_wrap=True, highlight=False, markup=False)
        return capture.get()


def expert_of(name: str) -> str:
    """The expert that a tensor of ours belongs to."""
    parts = name.split(".")
    if parts[:2] == ["joint", "mixtures"]:
        return parts[2]
    first = parts[0]
    if first in ("vision", "projector"):
        return "vision"
    return {"embedding": "vlm", "streams": ".".join(parts[:2])}.get(first, "action")


def sum_of_squares(tensor: torch.Tensor) -> float:
    """In float64, part by part: torch's own norm in float64 takes longer than reading the file."""
    # The order does not matter, so take the numbers as they lie in memory.
    axes = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))
    flat = tensor.permute(axes).reshape(-1)
    return sum(wide.dot(wide).item() for wide in map(torch.Tensor.double, flat.split(_PART)))
