"""The small parts by their definitions: layouts, positions, time, flow, attention, norms, casts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_models import small_flow, small_observation, small_policy

from pizero.model import (
    BetaTime,
    ConvTower,
    FlowPath,
    MixedActionEncoder,
    PerExpertIndex,
    RMSNorm,
    Segment,
    SharedCount,
    SinusoidalTime,
    TokenLayout,
    UniformTime,
    attend,
)
from pizero.model.flow import euler_times
from pizero.model.layout import Call

CPU = torch.device("cpu")
PI0 = TokenLayout(
    Segment("image", 2, 0, "vlm"),
    Segment("text", 1, 0, "vlm"),
    Segment("state", 1, 1, "action"),
    Segment("action", 2, 2, "action"),
)


# --- layouts and positions ------------------------------------------------------------------------


def test_mask_of_pi0():
    expected = [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    assert torch.equal(PI0.mask(), torch.tensor([expected], dtype=torch.bool))
    valid = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    masked = PI0.mask(valid)
    assert torch.equal(masked[0].int()[:, 1], torch.zeros(6).int())
    assert torch.equal(masked[1].int()[5], torch.tensor([1, 1, 1, 1, 1, 0]).int())


def test_picture_of_a_layout():
    assert PI0.show().split("\n") == [
        "        image  text   state  action",
        "image   x      x      .      .",
        "text    x      x      .      .",
        "state   x      x      x      .",
        "action  x      x      x      x",
    ]


def test_calls_of_pi0():
    assert PI0.calls() == (Call(0, 3, 3), Call(3, 4, 4), Call(4, 6, 6))
    suffix = TokenLayout(Segment("action", 2, 2, "action"))
    prefix = TokenLayout(*PI0.segments[:3])
    assert suffix.calls(past=prefix) == (Call(0, 2, 6),)
    assert prefix + suffix == PI0
    assert PI0.calls(["action"]) == (Call(0, 2, 6),)
    stopped = TokenLayout(*PI0.segments, stop_grad=[("action", "text"), ("action", "image")])
    assert stopped.calls()[-1] == Call(4, 6, 6, ((0, 2), (2, 3)))


FAST = TokenLayout(
    Segment("image", 3, 0, "vlm"), Segment("text", 4, 0, "vlm", causal=True),
    Segment("action", 2, 1, "action"),
)  # fmt: skip


def test_causal_text():
    """Pictures see the question; the answer is read token by token, and whole by what follows."""
    opens = {"text": torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)}
    assert FAST.ranks(opens).tolist() == [
        [0, 0, 0, 0, 1, 2, 2, 3, 3],
        [0, 0, 0, 0, 0, 0, 1, 2, 2],
    ]
    assert FAST.ranks().tolist() == [[0, 0, 0, 1, 2, 3, 4, 5, 5]]
    assert FAST.show().split("\n") == [
        "        image  text   action",
        "image   x      /      .",
        "text    x      /      .",
        "action  x      x      x",
    ]
    image, text, action = FAST.calls()
    assert (image.ranked, text.ranked, action.ranked) == ((0, 1), (3, 7), None)
    assert (image.key_stop, text.key_stop, action.key_stop) == (7, 7, 9)
    with pytest.raises(ValueError, match=r"no causal segment 'txt'; did you mean 'text'\?"):
        FAST.ranks({"txt": opens["text"]})


def test_layout_is_a_value():
    assert TokenLayout(*PI0.segments) == PI0
    assert hash(PI0) == hash(TokenLayout(*PI0.segments))
    assert PI0.span("state") == (3, 4)
    assert PI0.experts == ("vlm", "action")


def test_shared_count_skips_what_is_not_real():
    prefix, suffix = TokenLayout(*PI0.segments[:3]), TokenLayout(PI0.segments[3])
    valid = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)
    count = SharedCount()
    got = count(prefix, valid=valid, past=None, past_valid=None, device=CPU)
    assert got[valid].tolist() == [0, 1, 2, 0, 1, 2]
    got = count(suffix, valid=None, past=prefix, past_valid=valid, device=CPU)
    assert got.tolist() == [[3, 4], [3, 4]]
    got = SharedCount(start=1)(suffix, valid=None, past=prefix, past_valid=None, device=CPU)
    assert got.tolist() == [[5, 6]]


def test_per_expert_index_restarts():
    """open-pi-zero: pictures and words 1..3, state 1, actions 2..3, cached or not."""
    index = PerExpertIndex(start=1)
    whole = index(PI0, valid=None, past=None, past_valid=None, device=CPU)
    assert whole.tolist() == [[1, 2, 3, 1, 2, 3]]
    prefix, suffix = TokenLayout(*PI0.segments[:3]), TokenLayout(PI0.segments[3])
    later = index(suffix, valid=None, past=prefix, past_valid=None, device=CPU)
    assert later.tolist() == [[2, 3]]


# --- time and flow --------------------------------------------------------------------------------


def test_sinusoidal_time_by_hand():
    t = 0.37
    embed = SinusoidalTime(min_period=0.004, max_period=4.0, reverse=False)
    got = embed(torch.tensor([t], dtype=torch.float64), 6)[0]
    angles = [2 * math.pi * t / p for p in (0.004, 0.004 * 1000**0.5, 4.0)]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-7, rtol=0)
    reverse = replace(embed, reverse=True)
    turned = reverse(torch.tensor([1 - t], dtype=torch.float64), 6)[0]
    torch.testing.assert_close(turned, got, atol=1e-7, rtol=0)


def test_mixed_encoder_is_one_matrix_over_a_concatenation():
    """pi0: out(silu(W [action | time] + b)), the two halves of W being the two mixes."""
    encoder = MixedActionEncoder(action_dim=3, width=4)
    actions, time = torch.randn(2, 5, 3), torch.randn(2, 4)
    weight = torch.cat((encoder.action_mix.weight, encoder.time_mix.weight), dim=1)
    both = torch.cat((encoder.in_proj(actions), time[:, None].expand(2, 5, 4)), dim=-1)
    hidden = torch.nn.functional.silu(both @ weight.T + encoder.time_mix.bias)
    got = encoder(actions, encoder.token_term(time))
    torch.testing.assert_close(got, encoder.out_proj(hidden))


@pytest.mark.parametrize("sig_min", [0.0, 0.001])
def test_flow_path(sig_min):
    path, noise, actions = FlowPath(sig_min=sig_min), torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    start, end = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(path.point(noise, actions, start), noise)
    torch.testing.assert_close(path.point(noise, actions, end), actions + sig_min * noise)
    t, step = torch.tensor([0.1, 0.5, 0.8]), 0.1
    moved = path.point(noise, actions, t) + step * path.velocity(noise, actions)
    torch.testing.assert_close(path.point(noise, actions, t + step), moved)


def test_flow_times_follow_their_distribution_and_generator():
    beta, uniform = BetaTime(), UniformTime(high=0.5)
    draws = [s.sample((20_000,), torch.Generator().manual_seed(3)) for s in (beta, uniform) * 2]
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert 0 <= draws[0].min() < draws[0].max() < 0.999
    assert 0 <= draws[1].min() < draws[1].max() < 0.5
    # 1 - t / 0.999 is Beta(1.5, 1): the share below x is x^1.5.
    z = 1 - draws[0] / 0.999
    for x in (0.2, 0.5, 0.8):
        assert abs((z < x).float().mean() - x**1.5) < 0.01
    assert abs(draws[1].mean() - 0.25) < 0.01
    assert beta.sample((2, 3)).shape == (2, 3)


def test_euler_times():
    """Even steps from 0; in ten steps with the rounding of a float32 countdown."""
    assert euler_times(4, CPU).tolist() == [0.0, 0.25, 0.5, 0.75]
    ten = euler_times(10, CPU)
    assert ten.dtype == torch.float64
    torch.testing.assert_close(ten, torch.arange(10).double() / 10, atol=2e-7, rtol=0)
    left = torch.tensor(1.0)
    for t in ten:
        assert t == 1 - left.double()
        left = left + torch.tensor(-0.1)


# --- attention, norms, vision ---------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attend_by_definition(softcap, groups):
    q, k, v = (torch.randn(2, n, h, 6).double() for n, h in ((3, 4), (5, groups), (5, groups)))
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], dtype=torch.bool)
    got = attend(q, k, v, key_mask=mask, softcap=softcap)
    for b in range(2):
        for head in range(4):
            group = head // (4 // groups)
            logits = q[b, :, head] @ k[b, :, group].T / 6**0.5
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            weights = logits[:, mask[b]].softmax(-1)
            torch.testing.assert_close(got[b, :, head], weights @ v[b, mask[b], group])


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_a_row_without_keys_stays_finite(softcap):
    """Its result means nothing, but NaN would spread through zero-weighted values."""
    q = torch.randn(1, 2, 2, 4, requires_grad=True)
    k, v = torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4)
    out = attend(q, k, v, key_mask=torch.zeros(1, 3, dtype=torch.bool), softcap=softcap)
    out.sum().backward()
    assert out.isfinite().all()
    assert q.grad.isfinite().all()


def test_norm_keeps_the_dtype_and_computes_wide():
    norm = RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 8).bfloat16()
    wide = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), (wide * (1 + norm.weight)).bfloat16())
    assert norm(x.double()).dtype == torch.float64


def test_conv_tower_tokens_go_row_by_row():
    tower = ConvTower(image_size=(8, 12), widths=[3, 5])
    image = torch.rand(1, 3, 8, 12)
    tokens = tower(image)
    assert tokens.shape == (1, tower.num_tokens, tower.width) == (1, 6, 5)
    grid = tower.stages(image)[0]
    expected = torch.stack([grid[:, r, c] for r in range(2) for c in range(3)])
    torch.testing.assert_close(tokens[0], expected + tower.position_embedding)


# --- precision and groups -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["toy", "demo", "pi0", "pi05"])
@torch.no_grad()
def test_cast(kind):
    """Bulk in bf16; norms, positions and flow layers wide; numbers near; results float32."""
    model, wide = small_policy(kind).cast(torch.bfloat16), small_policy(kind)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    narrow = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert all(n.startswith(("vision.", "projector.", "embedding.", "joint.")) for n in narrow)
    assert {n for n in kept if n.startswith("joint.")} == {
        n for n, _ in model.named_parameters() if n.startswith("joint.") and "norm" in n
    }
    assert "vision.position_embedding" in kept
    assert {"projector.weight", "embedding.weight"} <= narrow
    observation, flow = small_observation(model), small_flow(model)
    loss, expected = model(observation, *flow), wide(observation, *flow)
    assert loss.dtype == torch.float32
    error = (loss - expected).abs().mean() / expected.abs().mean()
    assert 1e-5 < error < 0.05
    assert model.sample(observation, flow[1][:, 0], 2).dtype == torch.float32


@pytest.mark.parametrize("kind", ["toy", "pi05"])
def test_autocast(kind):
    model = small_policy(kind)
    observation, flow = small_observation(model), small_flow(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(observation, *flow)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert all(p.grad.isfinite().all() for g in model.parameter_groups().values() for p in g)
    expected = model(observation, *flow)
    assert (loss - expected).abs().mean() / expected.abs().mean() < 0.05


@torch.no_grad()
def test_clip_is_the_last_thing():
    """open-pi-zero clips what is returned, not the way there."""
    model = small_policy("pi0", "compat@model=open_pi_zero")
    observation, noise = small_observation(model), 3 * small_flow(model)[1][:, 0]
    path = model.trajectory(observation, noise, 3)
    assert len(path) == 4
    assert torch.equal(path[0], noise)
    assert path[-1].abs().max() > 1
    assert torch.equal(model.sample(observation, noise, 3), path[-1].clamp(-1, 1))


@pytest.mark.parametrize("kind", ["toy", "demo", "pi0", "pi05"])
def test_groups_hold_every_trainable_weight_once(kind):
    model = small_policy(kind, "model.joint.mixtures.vlm.kv_only_tail=false")
    groups = model.parameter_groups()
    assert set(groups) == {"vision", "vlm", "action"}
    grouped = [id(p) for group in groups.values() for p in group]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    for parameter in groups["vision"]:
        parameter.requires_grad_(False)
    assert set(model.parameter_groups()) == {"vlm", "action"}
