"""All experts in lockstep. They meet in attention and nowhere else.

Tokens come and go by segment name; which expert runs a segment, and who sees whom, is the
layout's business. No expert is known here by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pizero.model.attention import attend
from pizero.model.block import Block, BlockModulation
from pizero.model.cache import PrefixCache, RoomyCache
from pizero.model.containers import Named
from pizero.model.layout import Call, Segment, TokenLayout, did_you_mean
from pizero.model.mixture import Mixture, MixtureModulation
from pizero.model.rope import Rotary
from pizero.types import Bool, Float, Int, Tensor


class JointModel(nn.Module):
    """Named mixtures that share attention.

    Raises ValueError, naming the two, when mixtures differ in depth, heads or head size.
    """

    def __init__(self, mixtures: Mapping[str, Mixture], *, softcap: float | None = None) -> None:
        super().__init__()
        _check_agreement(mixtures)
        self.mixtures = Named[Mixture](dict(mixtures))
        self.softcap = softcap
        self._run_layer = run_layer

    @property
    def depth(self) -> int:
        return next(iter(self.mixtures.values())).depth

    def compile_layers(self, **options) -> None:
        """Compile the repeated layer alone: seconds instead of minutes, and one graph for all."""
        # Three kinds of layer (prefix, suffix, last), with and without gradients, for batches of
        # one, of a known and of any size: more versions than Dynamo's usual limit of 8.
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 64)
        self._run_layer = torch.compile(run_layer, fullgraph=True, **options)

    def forward(
        self,
        tokens: Mapping[str, Tensor],
        layout: TokenLayout,
        *,
        positions: Int[Tensor, "_ s"],
        valid: Bool[Tensor, "b s"] | None = None,
        modulation: Mapping[str, MixtureModulation] | None = None,
        cache: PrefixCache | None = None,
        read: Iterable[str] | None = None,
        opens: Mapping[str, Bool[Tensor, "b _"]] | None = None,
    ) -> tuple[dict[str, Tensor], PrefixCache]:
        """Run `tokens` [b s width] of every segment; return those of `read`, and the cache.

        `read` (all by default) names the segments whose result is wanted: the last layer computes
        only those, and keys and values. `valid` marks real tokens, None if all are. With `cache`
        the layout continues the cached one; the cache returned holds both. `opens` marks, for a
        causal segment, the tokens that open a block of their own; without it, all do.
        """
        read = layout.names if read is None else tuple(read)
        self._check(tokens, layout, read)
        past = cache.layout if cache else None
        x, rotary = self._gather(tokens, layout, positions)
        key_mask = _key_mask(valid, cache, layout, next(iter(x.values())))
        inner, last = _plan(layout, layout.names, past), _plan(layout, read, past)
        inner_sight, last_sight = (
            _sight(plan.calls, layout, past, key_mask, opens, positions.device)
            for plan in (inner, last)
        )
        keys, values = [], []
        for i in range(self.depth):
            plan, sight = (last, last_sight) if i == self.depth - 1 else (inner, inner_sight)
            blocks = {name: self.mixtures[name].blocks[i] for name in x}
            mods = {name: m.blocks[i] for name, m in (modulation or {}).items() if name in x}
            before = (cache.keys[i], cache.values[i]) if cache else None
            x, k, v = self._run_layer(blocks, x, rotary, mods, plan, before, sight, self.softcap)
            keys.append(k)
            values.append(v)
        out = {}
        for name, h in x.items():
            h = self.mixtures[name].finish(h, (modulation or {}).get(name))
            at = h.shape[1] - sum(s.length for s in layout.of_expert(name))
            for s in layout.of_expert(name):
                if s.name in read:
                    out[s.name] = h[:, at : at + s.length]
                at += s.length
        joined = past + layout if past else layout
        return out, PrefixCache(joined, tuple(keys), tuple(values), key_mask)

    def step(
        self,
        expert: str,
        x: Float[Tensor, "b 1 width"],
        cache: RoomyCache,
        *,
        slot: Int[Tensor, 1],
        positions: Int[Tensor, "b 1"],
    ) -> Float[Tensor, "b 1 width"]:
        """Run one token of an expert, which sees all that `cache` holds, and keep it at `slot`.

        Nothing changes shape from step to step: it compiles once, and costs the same at the end of
        a long answer as at its start.
        """
        mixture = self.mixtures[expert]
        cache.valid.index_fill_(1, slot, True)
        runs, length = ((expert, 0, 1),), cache.valid.shape[1]
        plan = Plan(runs, runs, {expert: 0}, (Call(0, 1, length),))
        out, rotary = {expert: x.to(mixture.dtype)}, {expert: mixture.rotary(positions)}
        for block, *kept in zip(mixture.blocks, cache.keys, cache.values, strict=True):
            past = (kept[0], kept[1])
            out, _, _ = self._run_layer(
                {expert: block}, out, rotary, {}, plan, past, (cache.valid,), self.softcap, slot
            )
        return mixture.finish(out[expert])

    def _gather(
        self, tokens: Mapping[str, Tensor], layout: TokenLayout, positions: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Rotary]]:
        """Each expert's tokens, in its own dtype, and their rotations."""
        x, rotary = {}, {}
        for name in layout.experts:
            mixture = self.mixtures[name]
            segments = [s.name for s in layout.of_expert(name)]
            x[name] = _cat([tokens[s].to(mixture.dtype) for s in segments])
            spans = [layout.span(s) for s in segments]
            rotary[name] = mixture.rotary(_cat([positions[:, a:b] for a, b in spans]))
        return x, rotary

    def _check(
        self, tokens: Mapping[str, Tensor], layout: TokenLayout, read: tuple[str, ...]
    ) -> None:
        for s in layout.segments:
            if s.expert not in self.mixtures:
                hint = did_you_mean(s.expert, self.mixtures)
                raise ValueError(f"segment {s.name!r} names expert {s.expert!r}{hint}")
            if s.name not in tokens:
                raise ValueError(f"no tokens for segment {s.name!r}; got {list(tokens)}")
            want = (s.length, self.mixtures[s.expert].width)
            got = tuple(tokens[s.name].shape[1:])
            if got != want:
                raise ValueError(
                    f"segment {s.name!r} expects tokens [b {want[0]} {want[1]}], got {got}"
                )
            if s.name in read and self.mixtures[s.expert].kv_only_tail:
                raise ValueError(
                    f"segment {s.name!r} cannot be read: expert {s.expert!r} was built with "
                    "kv_only_tail and has no output"
                )


class Plan(NamedTuple):
    """How the tokens of experts interleave in one layer.

    `runs` are (expert, start, stop) within that expert's tokens, in layout order; `query_runs` the
    same for queries; `query_from` the first token of each expert that has a query.
    """

    runs: tuple[tuple[str, int, int], ...]
    query_runs: tuple[tuple[str, int, int], ...]
    query_from: dict[str, int]
    calls: tuple[Call, ...]


# The mask of every attention call of a layer; see `_sight`.
Sight = tuple[Tensor | None, ...]


def run_layer(
    blocks: dict[str, Block],
    x: dict[str, Tensor],
    rotary: dict[str, Rotary],
    modulation: dict[str, BlockModulation],
    plan: Plan,
    past: tuple[Tensor, Tensor] | None,
    sight: Sight,
    softcap: float | None,
    slot: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One layer of every expert: project apart, attend together, finish apart.

    Returns the next tokens (of experts with queries) and all keys and values, past ones included:
    behind the past, or written into it at `slot`.
    """
    q: dict[str, Tensor] = {}
    k: dict[str, Tensor] = {}
    v: dict[str, Tensor] = {}
    for name, block in blocks.items():
        query, k[name], v[name] = block.project(
            x[name], rotary[name], modulation.get(name), query_from=plan.query_from[name]
        )
        if query is not None:
            q[name] = query
    keys, values = (
        _interleave(k, plan.runs, past and past[0], slot),
        _interleave(v, plan.runs, past and past[1], slot),
    )
    attended: dict[str, list[Tensor]] = {name: [] for name in blocks}
    if plan.calls:
        queries = _interleave(q, plan.query_runs)
        pairs = zip(plan.calls, sight, strict=True)
        outs = _cat([_call(c, queries, keys, values, mask, softcap) for c, mask in pairs])
        at = 0
        for name, start, stop in plan.query_runs:
            attended[name].append(outs[:, at : at + stop - start])
            at += stop - start
    next_x = {
        name: block.finish(
            x[name][:, plan.query_from[name] :], _cat(attended[name]), modulation.get(name)
        )
        for name, block in blocks.items()
        if attended[name]
    }
    return next_x, keys, values


def _call(
    c: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None
) -> Tensor:
    k, v = k[:, : c.key_stop], v[:, : c.key_stop]
    if c.stopped:
        k, v = _detach(k, c.stopped), _detach(v, c.stopped)
    q = q[:, c.start : c.stop]
    if mask is not None and mask.ndim == 3:
        return attend(q, k, v, sight=mask, softcap=softcap)
    return attend(q, k, v, key_mask=mask, softcap=softcap)


def _detach(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    """`x` with no gradient through the given ranges of tokens."""
    pieces, at = [], 0
    for start, stop in ranges:
        pieces += [x[:, at:start], x[:, start:stop].detach()]
        at = stop
    return torch.cat((*pieces, x[:, at:]), dim=1)


def _plan(layout: TokenLayout, wanted: tuple[str, ...], past: TokenLayout | None) -> Plan:
    query_from, queried = {}, []
    for expert in layout.experts:
        segments = layout.of_expert(expert)
        skipped = 0
        for s in segments:
            if s.name in wanted:
                break
            skipped += s.length
        query_from[expert] = skipped
        at = 0
        for s in segments:
            if at >= skipped:
                queried.append(s.name)
            at += s.length
    in_order = [s for s in layout.segments if s.name in queried]
    return Plan(
        _runs(layout.segments),
        _runs(in_order),
        query_from,
        layout.calls([s.name for s in in_order], past),
    )


def _runs(segments: Iterable[Segment]) -> tuple[tuple[str, int, int], ...]:
    at: dict[str, int] = {}
    runs = []
    for expert, group in groupby(segments, key=lambda s: s.expert):
        start = at.get(expert, 0)
        at[expert] = start + sum(s.length for s in group)
        runs.append((expert, start, at[expert]))
    return tuple(runs)


def _interleave(
    parts: Mapping[str, Tensor],
    runs: tuple[tuple[str, int, int], ...],
    past: Tensor | None = None,
    slot: Tensor | None = None,
) -> Tensor:
    """The tokens of all experts in layout order, behind those of the past or in their slot."""
    pieces = [] if past is None or slot is not None else [past]
    for name, start, stop in runs:
        part = parts[name]
        pieces.append(part if stop - start == part.shape[1] else part[:, start:stop])
    if past is not None and slot is not None:
        return past.index_copy_(1, slot, _cat(pieces))
    return _cat(pieces)


def _cat(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _key_mask(
    valid: Tensor | None, cache: PrefixCache | None, layout: TokenLayout, x: Tensor
) -> Tensor | None:
    """Which keys are real, past ones first; None when all are."""
    past = cache.valid if cache else None
    if valid is None and past is None:
        return None
    if valid is None:
        valid = x.new_ones(x.shape[0], layout.length, dtype=torch.bool)
    if cache is None:
        return valid
    if past is None:
        past = x.new_ones(x.shape[0], cache.layout.length, dtype=torch.bool)
    return torch.cat((past, valid), dim=1)


def _sight(
    calls: tuple[Call, ...],
    layout: TokenLayout,
    past: TokenLayout | None,
    key_mask: Tensor | None,
    opens: Mapping[str, Tensor] | None,
    device: torch.device,
) -> Sight:
    """The mask of every call: over its keys [b t], over queries and keys [b s t], or none."""
    rank = None
    if opens or any(c.ranked for c in calls):
        rank = layout.ranks(opens, device=device)
        # The past comes before all of this layout's blocks, or is in the first of them.
        rank = F.pad(rank, (past.length if past else 0, 0), value=-1)
    masks = []
    for c in calls:
        mask = None if key_mask is None else key_mask[:, : c.key_stop]
        if rank is not None and c.ranked:
            queries = rank[:, slice(*c.ranked), None]
            sees = rank[:, None, : c.key_stop] <= queries
            mask = sees if mask is None else sees & mask[:, None]
            if queries.shape[1] == 1:
                mask = mask[:, 0]
        masks.append(mask)
    return tuple(masks)


def _check_agreement(mixtures: Mapping[str, Mixture]) -> None:
    if not mixtures:
        raise ValueError("a joint model needs at least one mixture")
    (first, a), *rest = mixtures.items()
    for name, b in rest:
        for size in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(a, size) != getattr(b, size):
                raise ValueError(
                    f"mixture {name!r} has {size} {getattr(b, size)} but {first!r} has "
                    f"{getattr(a, size)}; all mixtures share attention, so they must match"
                )
