"""A checkpoint into a model: everything accounted for, or nothing at all.

Stored tensors are read one at a time, largest first, into weights that are allocated as they
arrive, so memory peaks little above the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pizero.agent.config import build
from pizero.agent.weights.folder import model_weights
from pizero.agent.weights.inspect import Found, inspect
from pizero.agent.weights.links import LeftOut
from pizero.agent.weights.lora import MergedLora
from pizero.agent.weights.report import ExpertReport, LoadReport, expert_of, sum_of_squares
from pizero.agent.weights.source import Source

UNREAD = "of the language model's last layer a flow policy reads keys and values only"


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and how it came by them."""

    model: Any
    report: LoadReport
    found: Found


def load_model(
    path: str | Path | Source | Found,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, Any] | None = None,
    kind: str | None = None,
    packages: Sequence[str] = ("pizero",),
) -> Loaded:
    """The model of any published checkpoint, in eval mode.

    `dtype` None keeps what is stored for the bulk of the weights; norms and the small layers that
    the flow is integrated through are float32 whatever the bulk is, as published inference has
    them. float64 holds for all. `overrides` and `kind` as in `inspect`; only classes from
    `packages` are built.

    Raises ValueError when anything is missing, unexplained or of the wrong shape.
    """
    found = path if isinstance(path, Found) else inspect(path, overrides=overrides, kind=kind)
    with torch.device("meta"):
        model = build(found.model, path="model", packages=packages)
    if dict(model.named_buffers()).keys() - model.state_dict().keys():
        # Buffers that are not saved are made by the constructor, so it has to run for real.
        model = build(found.model, path="model", packages=packages).to(device)
    bulk = found.source.entries[_bulk(found)].dtype if dtype is None else dtype
    if bulk == torch.float64:
        model.double()
    elif bulk != torch.float32:
        model.cast(bulk)
    report = load_into(model, found, device=device)
    return Loaded(model.eval(), report, found)


@torch.no_grad()
def load_into(
    model: nn.Module,
    path: str | Path | Source | Found,
    *,
    device: torch.device | str = "cpu",
    may_initialise: bool = False,
) -> LoadReport:
    """Fill a model from any published checkpoint; weights on meta come to life on `device`.

    `may_initialise` lets tensors stay as they are that the checkpoint has nothing for (an action
    expert beside PaliGemma's weights); the report names them.
    """
    found = path if isinstance(path, Found) else inspect(path)
    own = model_weights(model)
    report = check(own, found, may_initialise=may_initialise)
    for pair in found.twins:
        one, other = (found.source.read(name) for name in pair)
        if not torch.equal(one, other):
            raise ValueError(
                f"{found.source.path}: {pair[0]} and {pair[1]} are one tensor listed twice, but "
                "their numbers differ"
            )
        del one, other
    entries = found.source.entries
    wanted = [n for n, links in found.links.by_theirs.items() if any(x.ours in own for x in links)]
    for name in sorted(wanted, key=lambda n: -entries[n].num_elements):
        stored = found.source.read(name)
        for link in found.links.by_theirs[name]:
            if link.ours not in own:
                continue
            if own[link.ours].is_meta:
                own[link.ours] = _come_alive(model, link.ours, device)
            piece, whole = link.read(stored), own[link.ours]
            (whole if link.rows is None else whole[slice(*link.rows)]).copy_(piece)
            squares = sum_of_squares(piece)
            if not math.isfinite(squares):
                raise ValueError(f"{found.source.path}: {name} holds numbers that are not finite")
            report.experts[expert_of(link.ours)].squares += squares
            del piece  # a view: it would keep `stored` while the next one is read
        del stored
    return report


def check(
    own: Mapping[str, torch.Tensor], found: Found, *, may_initialise: bool = False
) -> LoadReport:
    """The report of a load that will succeed; ValueError, with all that is wrong, for another.

    `own` are the model's tensors by name; they may be on meta.
    """
    entries, links = found.source.entries, found.links
    left_out = {x.theirs: x for x in found.left_out}
    report = LoadReport(found.source.path, found.layout, found.kind, notes=found.notes)
    if isinstance(found.source, MergedLora):
        report.adapted = len(found.source.adapted)
    wrong = []
    for name, group in links.by_theirs.items():
        if name in entries and not any(x.ours in own for x in group):
            if _is_unread(group[0].ours):
                left_out[name] = LeftOut(name, UNREAD)
            else:
                wrong.append(f"{name}: the model has no {group[0].ours}")
    for name in entries:
        if name not in links.by_theirs and name not in left_out:
            wrong.append(f"{name}: not explained{_near(name, links.by_theirs, entries)}")
    for name, tensor in own.items():
        pieces = links.by_ours.get(name, ())
        expert = report.experts.setdefault(expert_of(name), ExpertReport())
        absent = [x.theirs for x in pieces if x.theirs not in entries]
        if not pieces and may_initialise:
            expert.initialised += 1
            expert.parameters += tensor.numel()
            report.initialised.append(name)
            continue
        if absent or not pieces:
            for theirs in absent or [name]:
                near = _near(theirs, entries, links.by_theirs)
                wrong.append(f"{theirs}: missing{near}")
            continue
        for x in pieces:
            shape = list(tensor.shape)
            if x.rows is not None:
                shape[0] = x.rows[1] - x.rows[0]
            try:
                got = list(x.shape(entries[x.theirs].shape))
            except Exception:  # einops and indexing each have their own for a wrong shape
                got = None
            if got != shape:
                stored = list(entries[x.theirs].shape)
                wrong.append(f"{x.theirs}: shape {stored} does not give {shape} of {name}")
            dtype = entries[x.theirs].dtype
            if dtype.is_floating_point != tensor.is_floating_point():
                wrong.append(f"{x.theirs}: {dtype} cannot be the numbers of {name}, {tensor.dtype}")
            expert.dtypes.add(dtype)
        expert.parameters += tensor.numel()
        if len(pieces) > 1:
            expert.merged += 1
        elif [x.theirs for x in pieces] == [name]:
            expert.loaded += 1
        else:
            expert.renamed += 1
    if wrong:
        shown = "\n  ".join(wrong[:20]) + (f"\n  and {len(wrong) - 20} more" if wrong[20:] else "")
        raise ValueError(
            f"{found.source.path} (read as {found.layout}, {found.kind}) does not fit in "
            f"{len(wrong)} places:\n  {shown}"
        )
    report.left_out = list(left_out.values())
    report.left_out_parameters = sum(entries[n].num_elements for n in left_out)
    return report


def _bulk(found: Found) -> str:
    """The stored tensor whose dtype stands for the checkpoint: the largest."""
    return max(found.source.entries, key=lambda n: found.source.entries[n].num_elements)


def _is_unread(ours: str) -> bool:
    return ours.startswith("joint.mixtures.vlm.")


def _come_alive(model: nn.Module, name: str, device: torch.device | str) -> torch.Tensor:
    """Real, uninitialised memory for a tensor on meta, wherever modules share it."""
    *path, last = name.split(".")
    old = getattr(model.get_submodule(".".join(path)), last)
    new = torch.empty_like(old, device=device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in model.modules():
        for key in [
            k for k, t in (*module._parameters.items(), *module._buffers.items()) if t is old
        ]:
            setattr(module, key, new)
    return new.detach()


def _near(name: str, candidates: Mapping[str, Any], matched: Mapping[str, Any]) -> str:
    """The nearest candidate without a partner of its own: a likely misspelling."""
    free = [c for c in candidates if c not in matched]
    near = get_close_matches(name, free, n=1, cutoff=0.7)
    return f"; nearest: {near[0]}" if near else ""
