"""Which tokens there are, which expert owns them, and who may look at whom.

A layout is an ordered list of segments. One rule decides sight: a query sees a key when
`block(key) <= block(query)` and the key is real. Three segments give pi0:

                  image text state action      keys
        image       x    x
        text        x    x
        state       x    x     x
        action      x    x     x      x
        queries

Because blocks never decrease along the layout, what a block may see is always a leading slice of
the keys, so attention needs no mask but for tokens that are not real.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise

import torch

from pizero.types import Bool, Tensor


@dataclass(frozen=True)
class Segment:
    """A named run of tokens: how many, in which attention block, and which expert runs them."""

    name: str
    length: int
    block: int
    expert: str


@dataclass(frozen=True)
class Call:
    """One attention call: these queries see the keys up to `key_stop`.

    `stopped` are the key ranges through which no gradient may pass.
    """

    start: int
    stop: int
    key_stop: int
    stopped: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, init=False)
class TokenLayout:
    """Segments in order. Immutable; lengths may differ from call to call.

    `stop_grad` lists (query segment, key segment) edges that pass keys and values but no gradient
    ("knowledge insulation", Driess et al. 2025). The key segment may lie in a cached prefix.

    Raises ValueError when a name occurs twice or blocks decrease along the layout.
    """

    segments: tuple[Segment, ...]
    stop_grad: frozenset[tuple[str, str]]

    def __init__(self, *segments: Segment, stop_grad: Iterable[tuple[str, str]] = ()) -> None:
        object.__setattr__(self, "segments", tuple(segments))
        object.__setattr__(self, "stop_grad", frozenset((q, k) for q, k in stop_grad))
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"segment names must differ, got {list(names)}")
        for before, after in pairwise(segments):
            if after.block < before.block:
                raise ValueError(
                    f"blocks must not decrease along the layout: segment {after.name!r} has block "
                    f"{after.block} but follows {before.name!r} with block {before.block}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.segments)

    @property
    def length(self) -> int:
        return sum(s.length for s in self.segments)

    @property
    def experts(self) -> tuple[str, ...]:
        """Experts in order of their first segment."""
        return tuple(dict.fromkeys(s.expert for s in self.segments))

    def __add__(self, other: TokenLayout) -> TokenLayout:
        return TokenLayout(
            *self.segments, *other.segments, stop_grad=self.stop_grad | other.stop_grad
        )

    def span(self, name: str) -> tuple[int, int]:
        """First and one-past-last token of a segment."""
        start = 0
        for s in self.segments:
            if s.name == name:
                return start, start + s.length
            start += s.length
        raise ValueError(f"no segment {name!r} in the layout{did_you_mean(name, self.names)}")

    def of_expert(self, expert: str) -> tuple[Segment, ...]:
        return tuple(s for s in self.segments if s.expert == expert)

    def calls(
        self, queries: Iterable[str] | None = None, past: TokenLayout | None = None
    ) -> tuple[Call, ...]:
        """The attention calls that serve `queries` (all segments by default), in layout order.

        Neighbouring segments of one block share a call. `past` are the cached segments in front;
        query positions count among `queries` only, key positions from the start of `past`.
        """
        wanted = set(self.names if queries is None else queries)
        before = past.segments if past else ()
        keys = (*before, *self.segments)
        ends: dict[int, int] = {}
        spans: dict[str, tuple[int, int]] = {}
        end = 0
        for s in keys:
            spans[s.name] = (end, end + s.length)
            end += s.length
            ends[s.block] = end
        calls: list[Call] = []
        at = 0
        for s in self.segments:
            if s.name not in wanted:
                continue
            stopped = tuple(spans[k.name] for k in keys if (s.name, k.name) in self.stop_grad)
            call = Call(at, at + s.length, ends[s.block], stopped)
            at = call.stop
            last = calls[-1] if calls else None
            if last and last.key_stop == call.key_stop and last.stopped == stopped:
                calls[-1] = Call(last.start, call.stop, call.key_stop, stopped)
            else:
                calls.append(call)
        return tuple(calls)

    def mask(self, valid: Bool[Tensor, "b s"] | None = None) -> Bool[Tensor, "b s s"]:
        """The rule of sight as a dense mask, True = may look: for pictures and as a reference."""
        block = torch.tensor([s.block for s in self.segments for _ in range(s.length)])
        sight = (block[None, :] <= block[:, None])[None]
        return sight if valid is None else sight.to(valid.device) & valid[:, None, :]

    def show(self) -> str:
        """The rule of sight, a row for each query segment."""
        width = max(len(n) for n in self.names)
        head = " " * (width + 2) + " ".join(n.ljust(width) for n in self.names)
        rows = [head.rstrip()]
        for q in self.segments:
            cells = [("x" if k.block <= q.block else ".").ljust(width) for k in self.segments]
            rows.append(f"{q.name.ljust(width)}  {' '.join(cells)}".rstrip())
        return "\n".join(rows)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the nearest known name, or the list of them."""
    known = list(known)
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {known}"
