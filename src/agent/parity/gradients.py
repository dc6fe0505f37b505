"""Gradients of the mean loss, under the stored names of the weights.

The way from our tensors to the stored ones is linear, so the loader's links carry gradients too.
What takes thought is what no link names:

- weights whose result nobody reads have no gradient of ours: theirs must be zero;
- a tensor listed twice (open-pi-zero's shared expert) has one gradient, under both names. A source
  that kept two copies gives each a part; the parts then add up to it;
- an embedding may be stored under the name of the tied word head;
- an adapter's parts get theirs through the weight that they were merged into.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from pizero.agent.weights import Found
from pizero.agent.weights.convert import OpenpiSource
from pizero.agent.weights.lora import MergedLora
from pizero.agent.weights.spelling import spell
from pizero.types import Tensor

TIED = {"embed.weight": "head.weight", "head.weight": "embed.weight"}


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every weight that has one."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def named_for(found: Found, names: Iterable[str]) -> Found:
    """The checkpoint as these gradients name it: openpi's PyTorch names may stand beside JAX's."""
    if found.kind not in ("pi0", "pi05") or any(n in found.source.entries for n in names):
        return found
    if not any(spell(name).startswith("expert.") for name in names):
        return found
    source = OpenpiSource(found)
    return replace(found, source=source, links=source.links, left_out=(), twins=())


@dataclass(frozen=True)
class Gradients:
    """Gradients of ours as a checkpoint of the source would hold them."""

    found: Found
    ours: Mapping[str, Tensor]  # under our names

    def theirs(self) -> dict[str, Tensor]:
        """The same under the stored names, zero where nothing of ours reads the weight."""
        entries = self.found.source.entries
        written = self.found.to_theirs(self.ours)
        for name, entry in entries.items():
            written.setdefault(name, torch.zeros(entry.shape))
        source = self.found.source
        if isinstance(source, MergedLora):
            for name in source.adapted:
                written |= source.gradients(name, written[name])
        for name, twin in self.found.twins:
            written[twin] = written[name]
        for name in (x.theirs for x in self.found.left_out if spell(x.theirs) == "head.weight"):
            embedding = self.found.links.by_ours["embedding.weight"][0].theirs
            read = self.found.source.read
            if torch.equal(read(name), read(embedding)):  # tied: one weight under two names
                written[name] = written[embedding]
        return written

    def resolve(self, name: str) -> str:
        """The stored weight that a gradient's name means: itself, or another spelling of it.

        Raises ValueError where there is no such weight.
        """
        source = self.found.source
        entries = source.base.entries if isinstance(source, MergedLora) else source.entries
        if name in entries:
            return name
        spelled = {spell(n): n for n in entries}
        mine = spell(name)
        resolved = spelled.get(mine) or spelled.get(TIED.get(mine, ""))
        if resolved is None:
            raise ValueError(f"no such tensor in {source.path}")
        return resolved


def joined_twins(found: Found, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored gradients, with the parts of a tensor kept twice added up where they differ."""
    joined = dict(stored)
    for one, other in found.twins:
        if one not in stored or other not in stored:
            continue
        a, b = stored[one], stored[other]
        if a.shape == b.shape and not torch.allclose(a, b, rtol=1e-3, atol=0):
            joined[one] = joined[other] = a + b
    return joined
