"""What another implementation does around its model, against ours: a case without weights.

`case.json` holds `facts` by name (rules, strings, small vectors) and tolerances, larger arrays lie
in `arrays.safetensors`. A fact that has a counterpart in pizero gives rows; others are listed, with
the reason.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pizero.agent.parity.case import FACTS, IO, Case
from pizero.agent.parity.facts import ARRAYS, Arrays, Facts
from pizero.agent.parity.report import CaseReport, Row, Section, words
from pizero.agent.parity.rules import Rule, Verdict, compare, rule_for

# What has no counterpart, by its place in the facts, and why.
LEFT_OUT = {
    "msgpack": "openpi's messages; pizero's simulators are spoken to in a protocol of their own",
    "running_stats.q01": "q01 and q99 of a histogram; pizero's are exact, and compared as such",
    "delta_actions.mask_2_0_2": "a short way to write masks; pizero's are written out",
    "pad_to_dim.already_wider": "pizero refuses values wider than the model",
    "resize_with_pad.cases.client_checksum": "pixels may be off by 1; the arrays are compared",
    "time_distribution.one_million_source_samples": "draws of another generator",
    "time_distribution.beta.one_million_samples": "draws of another generator",
    "time_distribution.uniform": "one draw for a batch; pizero draws for every sample alone",
}


def is_transforms(folder: str | Path) -> bool:
    """Whether a folder holds facts and no model's inputs."""
    path = Path(folder) / FACTS
    if not path.is_file() or (path.parent / IO).exists():
        return False
    try:
        tree = json.loads(path.read_text())
    except json.JSONDecodeError:
        return False
    return isinstance(tree, dict) and isinstance(tree.get("facts"), dict)


def check_transforms(folder: str | Path) -> CaseReport:
    """Compare every fact of a folder; what goes wrong is in the report."""
    folder = Path(folder)
    tree = json.loads((folder / FACTS).read_text())
    facts, section = tree["facts"], Section(folder / FACTS)
    tolerances = dict(_flat(tree.get("tolerances", {})))
    arrays = Arrays(folder, tree.get("arrays", ()))
    with tempfile.TemporaryDirectory() as scratch:
        counterparts = Facts(facts, arrays, Path(scratch))
        for name, fact in facts.items():
            check = getattr(counterparts, name, None)
            if check is None:
                section.unknown += [] if name in LEFT_OUT else [name]
                continue
            try:
                for values in check(fact):
                    section.rows.append(_row(*values, tolerances=tolerances))
            except Exception as error:
                verdict = Verdict(False, float("nan"), float("nan"), words(error))
                section.rows.append(Row(name, (), Rule(exact=True), verdict))
    section.left_out += [f"{name} ({why})" for name, why in LEFT_OUT.items() if _has(facts, name)]
    section.unknown += [f"arrays {name}.*" for name in arrays.unread]
    if arrays.absent:
        section.left_out.append(f"{', '.join(arrays.absent)} (not in {ARRAYS})")
    return CaseReport(Case(folder, tree, {}, {}, ()), (section,))


def _row(
    name: str,
    ours: Any,
    stored: Any,
    tolerance: str | Rule,
    where: torch.Tensor | None = None,
    *,
    tolerances: Mapping[str, Any],
) -> Row:
    x, y = (torch.as_tensor(np.asarray(values)) for values in (ours, stored))
    rule = tolerance if isinstance(tolerance, Rule) else _stated(tolerance, tolerances, y)
    return Row(name, tuple(y.shape), rule, compare(x, y, rule, where))


def _stated(tolerance: str, tolerances: Mapping[str, Any], stored: torch.Tensor) -> Rule:
    """The first number of the first tolerance that has these words in its name."""
    if tolerance == "exact":
        return Rule(exact=True)
    for name, value in tolerances.items():
        if tolerance in name and (number := re.search(r"\d[\d.]*(e-?\d+)?", str(value))):
            return Rule(atol=float(number[0]))
    return rule_for("", stored, ())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def _has(tree: Any, place: str) -> bool:
    """Whether there is something at a place such as fact.key; a list stands for its first entry."""
    for name in place.split("."):
        tree = tree[0] if isinstance(tree, list) else tree
        if name not in tree:
            return False
        tree = tree[name]
    return True
