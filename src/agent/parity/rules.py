"""When a tensor of ours counts as equal to a stored one: a case's `tolerance_rows`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from pizero.types import Tensor

ROW = 'a row has "match" and one of "exact": true, "atol" with "rtol", or "relative_norm"'


@dataclass(frozen=True)
class Rule:
    """One way to compare. Places agree when |ours - stored| <= atol + rtol |stored|; a norm agrees
    when |ours - stored| <= relative_norm |stored| over the whole tensor, or else all places do."""

    exact: bool = False
    atol: float | None = None
    rtol: float = 0.0
    relative_norm: float | None = None
    assumed: bool = False

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Rule:
        """A row of case.json; ValueError for one that says nothing."""
        rule = cls(
            exact=bool(row.get("exact", False)),
            atol=row.get("atol", 0.0 if "rtol" in row else None),
            rtol=row.get("rtol", 0.0),
            relative_norm=row.get("relative_norm"),
        )
        if not rule.exact and rule.atol is None and rule.relative_norm is None:
            raise ValueError(f"the tolerance row {dict(row)} gives no tolerance: {ROW}")
        return rule

    def __str__(self) -> str:
        parts = ["exact"] if self.exact else []
        if self.relative_norm is not None:
            parts.append(f"norm {self.relative_norm:g}")
        if self.atol is not None and not self.exact:
            parts.append(f"{self.atol:g}" + (f" + {self.rtol:g}|y|" if self.rtol else ""))
        return " or ".join(parts) + (" (assumed)" if self.assumed else "")


EXACT = Rule(exact=True, assumed=True)
GRADIENT = Rule(relative_norm=1e-4, assumed=True)
FLOAT = Rule(atol=3e-5, rtol=1e-5, assumed=True)


def rule_for(name: str, stored: Tensor, rows: Sequence[Mapping[str, Any]]) -> Rule:
    """The first row whose pattern fits the name; where none does, what float32 can be asked for."""
    for row in rows:
        if fnmatchcase(name, row["match"]):
            return Rule.of(row)
    if not stored.is_floating_point():
        return EXACT
    return GRADIENT if name.startswith("grad.") else FLOAT


@dataclass(frozen=True)
class Verdict:
    """How far ours is from the stored tensor, and whether that is within the rule."""

    ok: bool
    max_abs: float
    relative: float  # norm of the difference over norm of the stored tensor
    note: str = ""


def compare(ours: Tensor, stored: Tensor, rule: Rule, where: Tensor | None = None) -> Verdict:
    """Compare at the places that `where` marks (all by default)."""
    nothing = float("nan")
    if ours.shape != stored.shape:
        note = f"shape {list(ours.shape)}, stored {list(stored.shape)}"
        return Verdict(False, nothing, nothing, note)
    if where is not None:
        ours, stored = ours[where], stored[where]
    if not stored.numel():
        return Verdict(False, nothing, nothing, "no valid place to compare")
    x, y = ours.detach().double(), stored.double()
    difference = (x - y).abs()
    max_abs = difference.max().item()
    norm, size = difference.norm().item(), y.norm().item()
    relative = norm / size if size else (0.0 if norm == 0 else float("inf"))
    if not torch.isfinite(difference).all():
        return Verdict(False, max_abs, relative, "not finite")
    if rule.exact:
        return Verdict(bool((x == y).all()), max_abs, relative)
    near = rule.relative_norm is not None and relative <= rule.relative_norm
    if rule.atol is not None:
        near = near or bool((difference <= rule.atol + rule.rtol * y.abs()).all())
    return Verdict(near, max_abs, relative)
