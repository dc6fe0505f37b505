"""Experts in lockstep against a plain reference, for any layout: who sees whom, caches, gradients.

The reference knows nothing of runs, calls and slices: every token by itself, one dense mask.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import randomise

from pizero.model import JointModel, Mixture, Segment, TokenLayout

DEPTH, HEADS, HEAD_DIM = 2, 4, 6
WIDTHS = {"a": 8, "b": 12, "c": 6, "d": 10}
CHECKS = settings(max_examples=30, deadline=None, derandomize=True)


def joint_model(seed: int = 0, *, softcap: float | None = None, kv_heads: int = 2) -> JointModel:
    mixtures = {
        name: Mixture(
            width=width, depth=DEPTH, mlp_dim=2 * width, num_heads=HEADS, num_kv_heads=kv_heads,
            head_dim=HEAD_DIM, rope_base=100.0 if name == "b" else 10_000.0,
        )
        for name, width in WIDTHS.items()
    }  # fmt: skip
    return randomise(JointModel(mixtures, softcap=softcap), seed).double()


@st.composite
def drawn(draw) -> list[tuple[str, int, int, str]]:
    """Segments of two to four experts in random blocks; experts return, and share blocks."""
    experts = draw(st.sampled_from(["ab", "abc", "abcd"]))
    block, segments = 0, []
    for i in range(draw(st.integers(1, 7))):
        block += draw(st.integers(0, 2)) if i else 0
        segments.append((f"s{i}", draw(st.integers(1, 3)), block, draw(st.sampled_from(experts))))
    return segments


@st.composite
def drawn_causal(draw) -> list[tuple[str, int, int, str, bool]]:
    """Segments of which some hold tokens that come one after another."""
    segments = draw(drawn())
    causal = draw(st.lists(st.booleans(), min_size=len(segments), max_size=len(segments)))
    return [(*s, c) for s, c in zip(segments, causal, strict=True)]


def random_opens(layout: TokenLayout, batch: int = 2) -> dict[str, torch.Tensor]:
    return {s.name: torch.rand(batch, s.length) < 0.6 for s in layout.segments if s.causal}


def lay_out(segments: list[tuple[str, int, int, str]]) -> TokenLayout:
    return TokenLayout(*(Segment(*s) for s in segments))


def random_tokens(layout: TokenLayout, batch: int = 2) -> dict[str, torch.Tensor]:
    return {
        s.name: torch.randn(batch, s.length, WIDTHS[s.expert], dtype=torch.float64)
        for s in layout.segments
    }


def random_valid(layout: TokenLayout, batch: int = 2) -> torch.Tensor:
    """The first token is real: a query that sees no key at all has no defined result."""
    valid = torch.rand(batch, layout.length) < 0.7
    valid[:, 0] = True
    return valid


def rank_by_rank(layout, opens, row) -> list[list[bool]]:
    """Who sees whom in one row, block numbers counted token by token."""
    numbers, number, block = [], 0, layout.segments[0].block
    for s in layout.segments:
        for i in range(s.length):
            own = s.causal and (s.name not in opens or bool(opens[s.name][row, i]))
            number += own or s.block != block
            block = s.block
            numbers.append(number)
    return [[key <= query for key in numbers] for query in numbers]


def reference(
    model: JointModel, tokens, layout, positions, valid, opens=None
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Gemma's layer token by token, with weights looked up by the token's expert."""
    owner = [s for s in layout.segments for _ in range(s.length)]
    weights = {name: dict(m.named_parameters()) for name, m in model.mixtures.items()}
    x = [tokens[s.name][:, i] for s in layout.segments for i in range(s.length)]
    b, n = x[0].shape[0], len(x)
    sees = torch.tensor([rank_by_rank(layout, opens or {}, row) for row in range(b)])
    if valid is not None:
        sees = sees & valid[:, None]

    def norm(v, weight):
        return v / (v.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)

    def turn(v, i):
        base = model.mixtures[owner[i].expert].rope_base
        turns = torch.tensor([base ** (-2 * c / HEAD_DIM) for c in range(HEAD_DIM // 2)]).double()
        angle = positions[:, i, None, None].double() * turns
        re, im = v[..., : HEAD_DIM // 2], v[..., HEAD_DIM // 2 :]
        return torch.cat(
            (re * angle.cos() - im * angle.sin(), im * angle.cos() + re * angle.sin()), dim=-1
        )

    all_keys = []
    for layer in range(DEPTH):
        q, k, v = [], [], []
        for i in range(n):
            w = {key: weights[owner[i].expert][f"blocks.{layer}.{key}.weight"]
                 for key in ("attention_norm", "q_proj", "kv_proj")}  # fmt: skip
            h = norm(x[i], w["attention_norm"])
            q.append(turn((h @ w["q_proj"].T).view(b, HEADS, HEAD_DIM), i))
            key, value = (h @ w["kv_proj"].T).view(b, 2, -1, HEAD_DIM).unbind(1)
            k.append(turn(key, i).repeat_interleave(HEADS // key.shape[1], dim=1))
            v.append(value.repeat_interleave(HEADS // value.shape[1], dim=1))
        q, k, v = (torch.stack(t, dim=2) for t in (q, k, v))
        all_keys.append(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        if model.softcap:
            scores = model.softcap * torch.tanh(scores / model.softcap)
        scores = scores.masked_fill(~sees[:, None], -math.inf)
        attended = scores.softmax(-1) @ v
        for i in range(n):
            w = {key: weights[owner[i].expert][f"blocks.{layer}.{key}.weight"]
                 for key in ("o_proj", "mlp_norm", "gate_up_proj", "down_proj")}  # fmt: skip
            h = x[i] + attended[:, :, i].flatten(1) @ w["o_proj"].T
            gate, up = (norm(h, w["mlp_norm"]) @ w["gate_up_proj"].T).chunk(2, dim=-1)
            wide = 0.5 * gate * (1 + torch.tanh((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
            x[i] = h + (wide * up) @ w["down_proj"].T
    for i in range(n):
        x[i] = norm(x[i], weights[owner[i].expert]["final_norm.weight"])
    whole = torch.stack([torch.cat((v, v.new_zeros(b, 12 - v.shape[1])), dim=1) for v in x], dim=1)
    out = {}
    for s in layout.segments:
        start, stop = layout.span(s.name)
        out[s.name] = whole[:, start:stop, : WIDTHS[s.expert]]
    return out, all_keys


@given(drawn(), st.booleans(), st.sampled_from([None, 2.0]), st.sampled_from([1, 2, 4]))
@CHECKS
def test_equals_a_dense_mask(segments, masked, softcap, kv_heads):
    layout = lay_out(segments)
    model = joint_model(softcap=softcap, kv_heads=kv_heads)
    tokens, valid = random_tokens(layout), random_valid(layout) if masked else None
    positions = torch.randint(40, (2, layout.length))
    out, cache = model(tokens, layout, positions=positions, valid=valid)
    expected, keys = reference(model, tokens, layout, positions, valid)
    for name in layout.names:
        # The model's rotations are float32, the reference's float64.
        torch.testing.assert_close(out[name], expected[name], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(cache.keys, keys, strict=True):
        mine = mine.repeat_interleave(HEADS // kv_heads, dim=2).transpose(1, 2)
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@given(drawn_causal(), st.booleans(), st.booleans(), st.sampled_from([None, 2.0]))
@CHECKS
def test_causal_segments_equal_a_dense_mask(segments, told, masked, softcap):
    """Tokens one after another, all of them or those that each row marks."""
    layout = lay_out(segments)
    model = joint_model(softcap=softcap)
    tokens, valid = random_tokens(layout), random_valid(layout) if masked else None
    opens = random_opens(layout) if told else None
    positions = torch.randint(40, (2, layout.length))
    out, _ = model(tokens, layout, positions=positions, valid=valid, opens=opens)
    expected, _ = reference(model, tokens, layout, positions, valid, opens)
    for name in layout.names:
        torch.testing.assert_close(out[name], expected[name], atol=1e-5, rtol=1e-5)
    sees = torch.tensor([rank_by_rank(layout, opens or {}, row) for row in range(2)])
    assert torch.equal(layout.mask(opens=opens).expand(2, -1, -1), sees)


@given(drawn_causal(), st.data())
@CHECKS
def test_causal_segments_behind_a_cache(segments, data):
    """Cut anywhere between segments, and read less: the same as one pass."""
    layout = lay_out(segments)
    model, tokens, valid = joint_model(), random_tokens(layout), random_valid(layout)
    opens, positions = random_opens(layout), torch.randint(40, (1, layout.length))
    # A block that a cached segment shares with a later one would have had to see that.
    cuts = [
        i for i, s in enumerate(layout.segments)
        if i and (s.block > layout.segments[i - 1].block or s.causal)
    ]  # fmt: skip
    cut = data.draw(st.sampled_from(cuts or [0]))
    first, second = (TokenLayout(*part) for part in (layout.segments[:cut], layout.segments[cut:]))
    for name in {s.name for s in second.segments[:1] if s.causal}:
        opens[name][:, 0] = True
    whole, _ = model(tokens, layout, positions=positions, valid=valid, opens=opens)
    cache = None
    if first.segments:
        at = slice(0, first.length)
        _, cache = model(
            {n: tokens[n] for n in first.names}, first, positions=positions[:, at],
            valid=valid[:, at], read=(), opens={n: opens[n] for n in first.names if n in opens},
        )  # fmt: skip
    read = data.draw(st.sets(st.sampled_from(second.names)))
    at = slice(first.length, None)
    out, _ = model(
        {n: tokens[n] for n in second.names}, second, positions=positions[:, at],
        valid=valid[:, at], cache=cache, read=read,
        opens={n: opens[n] for n in second.names if n in opens},
    )  # fmt: skip
    assert set(out) == read
    for name in read:
        torch.testing.assert_close(out[name], whole[name], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_steps_into_a_roomy_cache_equal_one_pass(padded):
    """Token by token into buffers, padding in front of them or not: a causal segment."""
    model = joint_model()
    prefix, answer = Segment("x", 4, 0, "a"), Segment("y", 5, 1, "a", causal=True)
    layout = TokenLayout(prefix, answer)
    tokens, positions = random_tokens(layout), torch.randint(40, (2, 9))
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 2:4] = not padded
    whole, _ = model(tokens, layout, positions=positions, valid=valid)
    kept = None if not padded else valid[:, :4]
    _, cache = model(
        {"x": tokens["x"]}, TokenLayout(prefix), positions=positions[:, :4], valid=kept, read=()
    )
    before = [k.clone() for k in cache.keys]
    roomy = cache.with_room(7)
    for i in range(5):
        out = model.step(
            "a", tokens["y"][:, i : i + 1], roomy,
            slot=torch.tensor([4 + i]), positions=positions[:, 4 + i : 5 + i],
        )  # fmt: skip
        torch.testing.assert_close(out, whole["y"][:, i : i + 1], atol=1e-12, rtol=1e-12)
    assert roomy.valid[0].tolist() == [True] * 9 + [False] * 2
    assert all(map(torch.equal, before, cache.keys))


@given(drawn(), st.data())
@CHECKS
def test_cached_equals_uncached(segments, data):
    """Cut between any two blocks, once or twice: the same as one pass."""
    layout = lay_out(segments)
    model, tokens, valid = joint_model(), random_tokens(layout), random_valid(layout)
    positions = torch.randint(40, (1, layout.length))
    whole, whole_cache = model(tokens, layout, positions=positions, valid=valid)
    blocks = sorted({s.block for s in layout.segments})
    cuts = data.draw(st.sets(st.sampled_from(blocks), max_size=2))
    cache, got, at = None, {}, 0
    for low, high in zip([-1, *sorted(cuts)], [*sorted(cuts), blocks[-1]], strict=True):
        part = TokenLayout(*(s for s in layout.segments if low < s.block <= high))
        if not part.segments:
            continue
        span = slice(at, at + part.length)
        out, cache = model(
            {n: tokens[n] for n in part.names}, part,
            positions=positions[:, span], valid=valid[:, span], cache=cache,
        )  # fmt: skip
        got, at = got | out, span.stop
    assert cache.layout == layout
    assert torch.equal(cache.valid, valid)
    for name in layout.names:
        torch.testing.assert_close(got[name], whole[name], atol=1e-12, rtol=1e-12)
    for kind in ("keys", "values"):
        for mine, theirs in zip(getattr(cache, kind), getattr(whole_cache, kind), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@given(drawn(), st.data())
@CHECKS
def test_reading_less_changes_nothing(segments, data):
    """The last layer computes only what is read; that equals what reading all gives."""
    layout = lay_out(segments)
    model, tokens, valid = joint_model(), random_tokens(layout), random_valid(layout)
    positions = torch.arange(layout.length)[None]
    read = data.draw(st.sets(st.sampled_from(layout.names)))
    full, full_cache = model(tokens, layout, positions=positions, valid=valid)
    some, cache = model(tokens, layout, positions=positions, valid=valid, read=read)
    assert set(some) == read
    for name in read:
        torch.testing.assert_close(some[name], full[name], atol=1e-12, rtol=1e-12)
    assert all(map(torch.equal, cache.keys, full_cache.keys))
    assert all(map(torch.equal, cache.values, full_cache.values))


@given(drawn())
@CHECKS
def test_later_blocks_leave_earlier_ones_alone(segments):
    layout = lay_out(segments)
    model, tokens = joint_model(), random_tokens(layout)
    positions = torch.arange(layout.length)[None]
    before, _ = model(tokens, layout, positions=positions)
    last = layout.segments[-1].block
    late = [s.name for s in layout.segments if s.block == last]
    other = tokens | {name: torch.randn_like(tokens[name]) for name in late}
    after, _ = model(other, layout, positions=positions)
    for name in layout.names:
        assert torch.equal(before[name], after[name]) == (name not in late)


@given(drawn())
@CHECKS
def test_tokens_that_are_not_real_are_inert(segments):
    layout = lay_out(segments)
    model, tokens, valid = joint_model(), random_tokens(layout), random_valid(layout)
    positions = torch.arange(layout.length)[None]
    before, _ = model(tokens, layout, positions=positions, valid=valid)
    changed = {}
    for name, x in tokens.items():
        start, stop = layout.span(name)
        changed[name] = torch.where(valid[:, start:stop, None], x, 1e3 * torch.randn_like(x))
    after, _ = model(changed, layout, positions=positions, valid=valid)
    for name in layout.names:
        start, stop = layout.span(name)
        real = valid[:, start:stop]
        assert torch.equal(before[name][real], after[name][real])


@given(drawn(), st.permutations(list(WIDTHS)))
@CHECKS
def test_order_of_mixtures_does_not_matter(segments, order):
    layout = lay_out(segments)
    model, tokens = joint_model(), random_tokens(layout)
    other = JointModel({name: model.mixtures[name] for name in order})
    positions = torch.arange(layout.length)[None]
    out, _ = model(tokens, layout, positions=positions)
    same, _ = other(tokens, layout, positions=positions)
    assert all(torch.equal(out[name], same[name]) for name in layout.names)


@given(drawn(), st.data())
@CHECKS
def test_stopped_edges_pass_values_and_no_gradients(segments, data):
    """Every edge from the last segment's block to one earlier segment's tokens is stopped."""
    layout = lay_out(segments)
    last = layout.segments[-1]
    early = [s.name for s in layout.segments if s.block < last.block]
    queries = [s.name for s in layout.segments if s.block == last.block]
    edges = [(q, k) for q in queries for k in early]
    stopped = TokenLayout(*layout.segments, stop_grad=edges)
    model, tokens = joint_model(), random_tokens(layout)
    positions = torch.arange(layout.length)[None]

    def run(layout):
        leaves = {n: x.clone().requires_grad_() for n, x in tokens.items()}
        out, _ = model(leaves, layout, positions=positions)
        out[last.name].square().sum().backward()
        return out, {n: x.grad for n, x in leaves.items()}

    out, free = run(layout)
    same, held = run(stopped)
    assert all(torch.equal(out[n], same[n]) for n in layout.names)
    for name in early:
        assert free[name] is not None
        assert free[name].abs().max() > 0
        assert held[name] is None or not held[name].any()
    assert held[last.name].abs().max() > 0


@pytest.mark.parametrize("cached", [False, True])
def test_stopped_edges_reach_into_a_cache(cached):
    """Only what is named is stopped, whether the keys come with the call or from a cache."""
    prefix = [Segment("x", 2, 0, "a"), Segment("y", 3, 0, "b")]
    suffix = [Segment("z", 2, 1, "c")]
    edges = [("z", "x")]
    model, tokens = joint_model(), random_tokens(TokenLayout(*prefix, *suffix))
    leaves = {n: x.clone().requires_grad_() for n, x in tokens.items()}
    positions = torch.arange(7)[None]
    # One layer, or `x` reaches `z` through the keys of `y` in the second.
    for mixture in model.mixtures.values():
        mixture.blocks = mixture.blocks[:1]
        mixture.depth = 1
    if cached:
        first = TokenLayout(*prefix, stop_grad=edges)
        _, cache = model({n: leaves[n] for n in "xy"}, first, positions=positions[:, :5], read=())
        second = TokenLayout(*suffix, stop_grad=edges)
        out, _ = model({"z": leaves["z"]}, second, positions=positions[:, 5:], cache=cache)
    else:
        out, _ = model(leaves, TokenLayout(*prefix, *suffix, stop_grad=edges), positions=positions)
    out["z"].sum().backward()
    assert leaves["x"].grad is None or not leaves["x"].grad.any()
    assert leaves["y"].grad.abs().max() > 0


@given(drawn())
@CHECKS
def test_calls_cover_every_query_once(segments):
    """The calls of a layout, written out as a matrix, are its mask."""
    layout = lay_out(segments)
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    at = 0
    for call in layout.calls():
        assert call.start == at
        mask[call.start : call.stop, : call.key_stop] = True
        at = call.stop
    assert at == layout.length
    assert torch.equal(mask, layout.mask()[0])
    stops = [c.key_stop for c in layout.calls()]
    assert stops == sorted(set(stops))
