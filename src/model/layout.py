"""Which tokens there are, which expert owns them, and who may look at whom.

A layout is an ordered list of segments. One rule decides sight: a query sees a key when
`block(key) <= block(query)` and the key is real. Four segments give pi0:

                  image text state action      keys
        image       x    x
        text        x    x
        state       x    x     x
        action      x    x     x      x
        queries

Because blocks never decrease along the layout, what a block may see is always a leading slice of
the keys, so attention needs no mask but for tokens that are not real.

A causal segment holds tokens that come one after another, as generated words do: each opens a block
of its own. Where a segment holds a question and its answer, of lengths that differ from row to row,
a forward pass is told which of its tokens open a block; the others join the token before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise

import torch

from pizero.types import Bool, Int, Tensor


@dataclass(frozen=True)
class Segment:
    """A named run of tokens: how many, in which attention block, and which expert runs them.

    The tokens of a `causal` segment see themselves and what came before.
    """

    name: str
    length: int
    block: int
    expert: str
    causal: bool = False


@dataclass(frozen=True)
class Call:
    """One attention call: these queries see the keys up to `key_stop`.

    `stopped` are the key ranges through which no gradient may pass. `ranked` is None where the
    queries see all of these keys; else ranks decide (see `TokenLayout.ranks`): those of the queries
    stand at this range of the keys, a range of one where all queries have the same.
    """

    start: int
    stop: int
    key_stop: int
    stopped: tuple[tuple[int, int], ...] = ()
    ranked: tuple[int, int] | None = None


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

        Neighbouring segments of one block share a call; a causal segment has its own. `past` are
        the cached segments in front; query positions count among `queries` only, key positions from
        the start of `past`.
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
        at, joinable = 0, False
        for i, s in enumerate(self.segments):
            joinable = joinable and not s.causal
            if s.name not in wanted:
                continue
            stopped = tuple(spans[k.name] for k in keys if (s.name, k.name) in self.stop_grad)
            first, last = spans[s.name]
            ranked = None
            if any(k.causal and k.block == s.block for k in self.segments[i:]):
                ranked = (first, last if s.causal else first + 1)
            call = Call(at, at + s.length, ends[s.block], stopped, ranked)
            at = call.stop
            before = calls[-1] if joinable else None
            if before and before.key_stop == call.key_stop and before.stopped == stopped:
                calls[-1] = replace(before, stop=call.stop)
            else:
                calls.append(call)
            joinable = not s.causal
        return tuple(calls)

    def ranks(
        self,
        opens: Mapping[str, Bool[Tensor, "b _"]] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Int[Tensor, "_ s"]:
        """Each token's block, counted from 0 through the layout: 1 row, or one for each of `opens`.

        `opens` marks, for a causal segment, the tokens that open a block; without it, all do.
        """
        opens = opens or {}
        for name in opens:
            if name not in [s.name for s in self.segments if s.causal]:
                causal = [s.name for s in self.segments if s.causal]
                raise ValueError(f"no causal segment {name!r}{did_you_mean(name, causal)}")
        rows = max([1, *(x.shape[0] for x in opens.values())])
        first = torch.zeros(rows, self.length, dtype=torch.long, device=device)
        start, block = 0, None
        for s in self.segments:
            if s.causal:
                first[:, start : start + s.length] = opens.get(s.name, 1)
            if block not in (None, s.block):
                first[:, start : start + 1] = 1
            start, block = start + s.length, s.block
        return first.cumsum(dim=1)

    def mask(
        self,
        valid: Bool[Tensor, "b s"] | None = None,
        opens: Mapping[str, Bool[Tensor, "b _"]] | None = None,
    ) -> Bool[Tensor, "b s s"]:
        """The rule of sight as a dense mask, True = may look: for pictures and as a reference."""
        rank = self.ranks(opens, device=None if valid is None else valid.device)
        sight = rank[:, None, :] <= rank[:, :, None]
        return sight if valid is None else sight & valid[:, None, :]

    def show(self) -> str:
        """The rule of sight, a row for each query segment; `/` where it sees a part."""
        width = max(len(n) for n in self.names)
        head = " " * (width + 2) + " ".join(n.ljust(width) for n in self.names)
        rows = [head.rstrip()]
        for i, q in enumerate(self.segments):
            cells = []
            for j, k in enumerate(self.segments):
                part = (
                    j >= i
                    and k.block == q.block
                    and any(s.causal for s in self.segments[i : j + 1])
                )
                cells.append("/" if part else "x" if k.block <= q.block else ".")
            rows.append(
                f"{q.name.ljust(width)}  {' '.join(c.ljust(width) for c in cells)}".rstrip()
            )
        return "\n".join(rows)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the nearest known name, or the list of them."""
    known = list(known)
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {known}"
