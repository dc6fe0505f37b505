"""Which piece of a stored tensor is which piece of one of ours, told once and used both ways.

A layout is a list of such links. Reading follows them from the stored names to ours, writing from
ours to the stored names, and gradients and reports follow them too, so the two directions cannot
disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import parse_shape, rearrange

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Link:
    """`ours[rows] = sign * rearrange(theirs[at], rule)`, and the way back.

    ours, theirs   names of the two tensors
    rule           einops pattern from their piece to ours; None where they are alike
    at             which piece of theirs: integers for stacked axes, slices for concatenated ones
    rows           which rows of ours; None for all of them
    sign           -1 where the two count flow time, and so velocity, in opposite directions
    """

    ours: str
    theirs: str
    rule: str | None = None
    at: Index = ()
    rows: tuple[int, int] | None = None
    sign: int = 1

    def read(self, theirs: torch.Tensor) -> torch.Tensor:
        """Our piece, from the whole of their tensor."""
        piece = theirs[self.at]
        piece = piece if self.rule is None else rearrange(piece, self.rule)
        return -piece if self.sign < 0 else piece

    def write(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Put our piece, from the whole of our tensor, in its place in theirs."""
        piece = ours if self.rows is None else ours[slice(*self.rows)]
        place = theirs[self.at]
        if self.rule is not None:
            there, here = (side.strip() for side in self.rule.split("->"))
            piece = rearrange(piece, f"{here} -> {there}", **parse_shape(place, there))
        place.copy_(-piece if self.sign < 0 else piece)

    def shape(self, theirs: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of our piece, from that of their tensor."""
        return tuple(self.read(torch.empty(theirs, device="meta")).shape)


@dataclass(frozen=True)
class LeftOut:
    """A stored tensor that no policy of ours reads, and why."""

    theirs: str
    reason: str


class Links:
    """All links of one checkpoint, by either name."""

    def __init__(self, links: Iterable[Link]) -> None:
        self.links = tuple(links)

    @cached_property
    def by_ours(self) -> Mapping[str, tuple[Link, ...]]:
        return _grouped(self.links, "ours")

    @cached_property
    def by_theirs(self) -> Mapping[str, tuple[Link, ...]]:
        return _grouped(self.links, "theirs")

    def to_theirs(
        self, ours: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """Tensors under their names and of `shapes`; places that no link fills are zero."""
        written = {}
        for name, links in self.by_theirs.items():
            known = [link for link in links if link.ours in ours]
            if known:
                like = ours[known[0].ours]
                written[name] = torch.zeros(shapes[name], dtype=like.dtype)
                for link in known:
                    link.write(ours[link.ours], written[name])
        return written


def _grouped(links: Iterable[Link], key: str) -> dict[str, tuple[Link, ...]]:
    groups: dict[str, list[Link]] = {}
    for link in links:
        groups.setdefault(getattr(link, key), []).append(link)
    return {name: tuple(group) for name, group in groups.items()}
