"""What must hold for every policy, whatever its experts: masks, prefix sharing, gradients, cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_models import KINDS, small_flow, small_observation, small_policy
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pizero.model import PiZero
from pizero.types import Observation

# pi0 and pi0.5 as shipped, a convolutional tower, and open-pi-zero's conventions.
FAMILIES = {kind: (kind,) for kind in KINDS}
FAMILIES["open_pi_zero"] = ("pi0", "compat@model=open_pi_zero")
EXACT = dict(atol=1e-6, rtol=1e-6)  # float64 inside, float32 results
WHOLE_TAIL = "model.joint.mixtures.vlm.kv_only_tail=false"


def policy(family: str, *overrides: str) -> PiZero:
    return small_policy(*FAMILIES[family], *overrides).double()


def masked(observation: Observation) -> Observation:
    """Row 0 lacks its second camera; row 1 has a shorter text."""
    cameras = torch.ones(observation.images.shape[:2], dtype=torch.bool)
    words = torch.ones_like(observation.tokens, dtype=torch.bool)
    cameras[0, 1], words[1, -2:] = False, False
    return replace(observation, image_mask=cameras, token_mask=words)


def count_flops() -> FlopCounterMode:
    """PyTorch's counter, told about the attention kernel of CPUs."""

    def attention(q, k, v, *_, out_shape=None, **__):
        return sdpa_flop_count(q, k, v)

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: attention})


def row(observation: Observation, i: int) -> Observation:
    state = None if observation.state is None else observation.state[i : i + 1]
    return Observation(observation.images[i : i + 1], observation.tokens[i : i + 1], state=state)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefix_and_suffix_equal_one_joint_pass(family):
    """Sampling's cached velocity is what one pass over all tokens gives."""
    model = policy(family)
    observation = masked(small_observation(model))
    _, noise, time = small_flow(model)
    tokens, valid, layout = model.embed_prefix(observation)
    velocity = model.velocity(model.prefix(observation), noise[:, 0], time[:, 0])
    whole = layout + model.suffix_layout()
    valid = torch.cat((valid, valid.new_ones(2, model.horizon)), dim=1)
    encoder, mixture = model.action_encoder, model.joint.mixtures["action"]
    embedded = model.time_embedding(time[:, 0], mixture.width)
    tokens["action"] = encoder(noise[:, 0], encoder.token_term(embedded)) * model.action_scale
    cond = encoder.condition(embedded)
    # With adaptive norms the state has no place in the action expert, so all its tokens are alike.
    modulation = {} if cond is None else {"action": mixture.modulate(cond)}
    positions = model.positions(
        whole, valid=valid, past=None, past_valid=None, device=torch.device("cpu")
    )
    out, _ = model.joint(
        tokens, whole, positions=positions, valid=valid, modulation=modulation, read=["action"]
    )
    expected = model.action_decoder(out["action"]).float()
    torch.testing.assert_close(velocity, expected, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pixels_of_absent_cameras_and_padding_are_inert(family):
    model = policy(family)
    observation = masked(small_observation(model))
    images, tokens = observation.images.clone(), observation.tokens.clone()
    images[0, 1], tokens[1, -2:] = torch.rand_like(images[0, 1]), 1
    other = replace(observation, images=images, tokens=tokens)
    flow = small_flow(model)
    assert torch.equal(model(observation, *flow), model(other, *flow))
    assert torch.equal(*(model.sample(o, flow[1][:, 0], 2) for o in (observation, other)))
    seen = replace(other, image_mask=None, token_mask=None)
    assert not torch.allclose(model(seen, *flow), model(other, *flow))


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_masked_equals_dropped(family):
    """Where positions count real tokens, leaving out what is masked gives the same policy."""
    model = policy(family)
    observation = small_observation(model)
    actions, noise, time = small_flow(model)
    loss = model(masked(observation), actions, noise, time)
    sampled = model.sample(masked(observation), noise[:, 0], 3)
    for i in range(2):
        kept = row(observation, i)
        if i == 0:
            kept = replace(kept, images=kept.images[:, :1])
        else:
            kept = replace(kept, tokens=kept.tokens[:, :-2])
        one = slice(i, i + 1)
        dropped = model(kept, actions[one], noise[one], time[one])
        torch.testing.assert_close(dropped, loss[one], **EXACT)
        torch.testing.assert_close(model.sample(kept, noise[one, 0], 3), sampled[one], **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mask_of_ones_is_no_mask(family):
    model = policy(family)
    observation, flow = small_observation(model), small_flow(model)
    ones = replace(
        observation,
        image_mask=torch.ones(2, 2, dtype=torch.bool),
        token_mask=torch.ones(2, 4, dtype=torch.bool),
    )
    torch.testing.assert_close(model(ones, *flow), model(observation, *flow), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_flow_samples_share_a_prefix(family):
    """Three samples in one call: loss and gradient of three calls, for one prefix."""
    model = policy(family)
    observation = masked(small_observation(model))
    actions, noise, time = small_flow(model, samples=3)
    together = model(observation, actions, noise, time)
    together.mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    for k in range(3):
        alone = model(observation, actions, noise[:, k : k + 1], time[:, k : k + 1])
        torch.testing.assert_close(alone[:, 0], together[:, k], **EXACT)
        (alone.mean() / 3).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_vision_call_and_one_prefix_whatever_follows(family):
    model = small_policy(*FAMILIES[family])
    calls = Counter()
    model.vision.register_forward_hook(lambda *_: calls.update(["vision"]))
    model.joint.register_forward_hook(
        lambda _module, args, out: calls.update(["prefix" if "image" in args[0] else "suffix"])
    )
    observation = small_observation(model, cameras=3)
    model(observation, *small_flow(model, samples=4))
    assert calls == {"vision": 1, "prefix": 1, "suffix": 1}
    calls.clear()
    model.sample(observation, small_flow(model)[1][:, 0], 5)
    assert calls == {"vision": 1, "prefix": 1, "suffix": 5}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tail", ["true", "false"])
def test_every_trainable_weight_has_a_gradient_and_no_other(family, tail):
    """Weights are frozen exactly when they have no influence on the loss."""
    model = policy(family, f"model.joint.mixtures.vlm.kv_only_tail={tail}")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(True)
    model(masked(small_observation(model)), *small_flow(model)).mean().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == trainable
    whole = {name for name, _ in model.named_parameters()}
    assert bool(whole - trainable) == (tail == "false")


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_all_come_to_learn(family):
    """pi0.5's gates start closed, and open within a few steps."""
    model = small_policy(*FAMILIES[family], seed=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(small_observation(model), *small_flow(model)).mean().backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unread_weights_cost_nothing(family):
    """A whole last layer is as cheap as one of keys and values alone: what is unread is not run."""

    def cost(model):
        with count_flops() as counter:
            model(small_observation(model), *small_flow(model))
            model.sample(small_observation(model), small_flow(model)[1][:, 0], 2)
        return counter.get_total_flops()

    lean, whole = small_policy(*FAMILIES[family]), small_policy(*FAMILIES[family], WHOLE_TAIL)
    assert cost(whole) == cost(lean) > 0


@torch.no_grad()
def test_cost_of_pi0_is_counted_by_hand():
    """Matrix products of a forward pass of small pi0: nothing is run twice or for nobody."""
    model = small_policy("pi0")
    batch, cameras, text, samples = 2, 3, 4, 5
    with count_flops() as counter:
        model(
            small_observation(model, batch=batch, cameras=cameras, text=text),
            *small_flow(model, batch=batch, samples=samples),
        )
    patches, horizon = cameras * 4, 5
    prefix = patches + text

    def layer(width, mlp, queries, keys, tokens):
        """kv for all tokens; q, attention, o and MLP for those that are read."""
        kv, q_and_o, gated = width * 2 * 8, 2 * width * 4 * 8, 3 * width * mlp
        return tokens * kv + queries * (q_and_o + gated + 2 * keys * 4 * 8)

    # SigLIP's patches, two layers of four projections, attention and MLP, and the projector.
    tower = patches * 3 * 4 * 4 * 12
    tower += 2 * patches * (4 * 12 * 12 + 2 * 4 * 12 + 2 * 12 * 20)
    tower += patches * 12 * 16
    seen = tower + 3 * 12  # the state's layer
    seen += layer(16, 24, prefix, prefix, prefix) + layer(16, 24, 0, 0, prefix)
    seen += layer(12, 20, 1, prefix + 1, 1) + layer(12, 20, 0, 0, 1)
    drawn = horizon * (2 * 3 * 12 + 2 * 12 * 12) + 12 * 12
    drawn += 2 * layer(12, 20, horizon, prefix + 1 + horizon, horizon)
    assert counter.get_total_flops() == 2 * batch * (seen + samples * drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_insulated_prefix(family):
    """With every edge from the action expert stopped: same loss, and nothing reaches the VLM."""
    queries = ["action"] if family == "pi05" else ["action", "state"]
    edges = ",".join(f"[{q},{k}]" for q in queries for k in ("image", "text"))
    free, held = policy(family), policy(family, f"model.stop_grad=[{edges}]")
    observation, flow = masked(small_observation(free)), small_flow(free)
    losses = []
    for model in (free, held):
        loss = model(observation, *flow)
        loss.mean().backward()
        losses.append(loss)
    assert torch.equal(*losses)
    groups = held.parameter_groups()
    for name in ("vision", "vlm"):
        assert all(p.grad is None or not p.grad.any() for p in groups[name])
    for a, b in zip(free.parameter_groups()["action"], groups["action"], strict=True):
        torch.testing.assert_close(a.grad, b.grad, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_any_number_of_cameras_words_and_states(family):
    model = small_policy(*FAMILIES[family])
    for cameras, text, frames in [(1, 1, 1), (3, 7, 2), (5, 2, 4)]:
        observation = small_observation(model, cameras=cameras, text=text, frames=frames)
        flow = small_flow(model, samples=2)
        loss = model(observation, *flow)
        assert loss.shape == (2, 2, model.horizon, model.action_dim)
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()
        sampled = model.sample(observation, flow[1][:, 0], 2)
        assert sampled.shape == flow[0].shape
        assert sampled.isfinite().all()


@pytest.mark.parametrize("horizon", [1, 2, 9])
@torch.no_grad()
def test_any_chunk_length(horizon):
    model = small_policy("toy", f"model.horizon={horizon}")
    loss = model(small_observation(model), *small_flow(model))
    assert loss.shape == (2, 1, horizon, 4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bytes_and_floats_are_one_picture(family):
    """uint8 0..255 is [-1, 1]."""
    model = policy(family)
    flow = small_flow(model)
    observation = small_observation(model)
    coded = torch.randint(256, observation.images.shape, dtype=torch.uint8)
    floats = replace(observation, images=coded.double() / 127.5 - 1)
    torch.testing.assert_close(
        model(replace(observation, images=coded), *flow), model(floats, *flow), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_do_not_see_each_other(family):
    model = policy(family)
    observation, (actions, noise, time) = (
        small_observation(model, batch=3),
        small_flow(model, batch=3),
    )
    together = model(observation, actions, noise, time)
    for i in range(3):
        one = slice(i, i + 1)
        alone = model(row(observation, i), actions[one], noise[one], time[one])
        torch.testing.assert_close(alone, together[one], **EXACT)
