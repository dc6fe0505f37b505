"""Models that speak: draws, fixed shapes, padding, the loss of an answer, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import SMALL, compose_model, randomise, set_sizes

from pizero.agent.config import build
from pizero.model import PaliGemma, PiZeroFast
from pizero.types import Observation

CLOSE = dict(atol=1e-5, rtol=1e-5)
VOCAB = 32


@torch.no_grad()
def small_speaker(kind: str = "paligemma", *overrides: str, seed: int = 0) -> PaliGemma:
    """A small model that says something new each time, and ends now and then."""
    sizes = {n: SMALL[n] for n in ("vision", "joint.mixtures.vlm")} | {None: {"vocab_size": VOCAB}}
    model = randomise(build(compose_model(kind, *set_sizes(sizes), *overrides)), seed)
    model.embedding.weight.mul_(0.1)
    return model.eval()


def prompt(*lengths: int, width: int | None = None, cameras: int = 1) -> Observation:
    """Random prompts of these lengths, padded on the right."""
    rows, width = len(lengths), width or max(lengths)
    images = torch.rand(rows, cameras, 3, 8, 8) * 2 - 1
    tokens = torch.randint(2, VOCAB, (rows, width))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Observation(images, tokens, token_mask=mask)


def asked(*, batch: int = 2) -> Observation:
    """Questions of two to four tokens with answers of three."""
    observation = prompt(*(5 + i % 3 for i in range(batch)), width=8)
    first = torch.tensor([2 + i % 3 for i in range(batch)])[:, None]
    places = torch.arange(8).expand(batch, 8)
    answer = (places >= first) & observation.token_mask
    return replace(observation, token_causal=answer, token_loss=answer)


def test_draws_follow_the_chances():
    model, rows, temperature = small_speaker(), 4000, 0.7
    one = prompt(3)
    many = replace(
        one, images=one.images.expand(rows, -1, -1, -1, -1),
        tokens=one.tokens.expand(rows, -1), token_mask=one.token_mask.expand(rows, -1),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    got = model.generate(many, max_new_tokens=1, temperature=temperature, generator=generator)
    with torch.no_grad():
        chances = (model(one)[0, -1] / temperature).softmax(-1)
    share = torch.bincount(got.tokens[:, 0], minlength=VOCAB) / rows
    assert ((share - chances).abs() < 5 * (chances * (1 - chances) / rows).sqrt() + 1e-9).all()
    again = model.generate(
        many, max_new_tokens=1, temperature=temperature, generator=generator.manual_seed(3)
    )
    assert torch.equal(again.tokens, got.tokens)


def test_a_low_temperature_is_greedy():
    model, observation = small_speaker(), prompt(5, 3)
    greedy = model.generate(observation, max_new_tokens=9)
    cold = model.generate(observation, max_new_tokens=9, temperature=1e-6)
    assert torch.equal(cold.tokens, greedy.tokens)
    warm = [model.generate(observation, max_new_tokens=9, temperature=2.0) for _ in range(2)]
    assert not torch.equal(warm[0].tokens, warm[1].tokens)


@torch.no_grad()
def test_generation_equals_running_the_whole_text_again():
    """The cache against no cache: each token is the likeliest after all before it."""
    model, observation = small_speaker(), prompt(4, 4, cameras=2)
    got = model.generate(observation, max_new_tokens=11, keep_logits=True)
    tokens = torch.cat((observation.tokens, got.tokens[:, :-1]), dim=1)
    causal = torch.arange(tokens.shape[1]).expand_as(tokens) >= 4
    whole = model(Observation(observation.images, tokens, token_causal=causal))[:, 3:]
    for row, length in enumerate(got.lengths.tolist()):
        torch.testing.assert_close(got.logits[row, :length], whole[row, :length], **CLOSE)
        assert torch.equal(got.tokens[row, :length], whole[row, :length].argmax(-1))


@pytest.mark.parametrize("kind", ["paligemma", "pi0_fast"])
def test_padding_changes_nothing(kind):
    """More of it, or on the other side, or a row alone."""
    model, observation = small_speaker(kind, "model.stop_together=false"), prompt(5, 3)
    expected = model.generate(observation, max_new_tokens=10)
    wider = replace(
        observation,
        tokens=torch.nn.functional.pad(observation.tokens, (2, 4), value=7),
        token_mask=torch.nn.functional.pad(observation.token_mask, (2, 4), value=False),
    )
    assert torch.equal(model.generate(wider, max_new_tokens=10).tokens, expected.tokens)
    alone = Observation(observation.images[1:], observation.tokens[1:, :3])
    assert torch.equal(model.generate(alone, max_new_tokens=10).tokens, expected.tokens[1:])


def test_an_absent_camera_is_as_good_as_none():
    model, observation = small_speaker(), prompt(4, 4, cameras=2)
    first = replace(observation, images=observation.images[:, :1])
    masked = replace(observation, image_mask=torch.tensor([[True, False]] * 2))
    expected = model.generate(first, max_new_tokens=8).tokens
    assert torch.equal(model.generate(masked, max_new_tokens=8).tokens, expected)


def test_a_token_costs_one_call_into_the_same_buffers(monkeypatch):
    model = small_speaker("pi0_fast")
    step, shapes, buffers = model.step, set(), set()

    def counted(token, cache, *, slot, position):
        shapes.add((tuple(token.shape), tuple(cache.keys[0].shape), tuple(position.shape)))
        buffers.add(tuple(x.data_ptr() for x in (*cache.keys, *cache.values, cache.valid)))
        counted.calls += 1
        return step(token, cache, slot=slot, position=position)

    counted.calls = 0
    monkeypatch.setattr(model, "step", counted)
    model.decode(prompt(5, 3), max_new_tokens=30)
    assert counted.calls == 29
    assert len(shapes) == len(buffers) == 1


def test_the_bulk_in_bfloat16():
    model = small_speaker().cast(torch.bfloat16)
    got = model.generate(prompt(5, 3), max_new_tokens=4, keep_logits=True)
    assert got.logits.dtype == torch.float32
    assert model.embedding.weight.dtype == torch.bfloat16


# --- the loss -------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    model, observation = small_speaker("pi0_fast", seed=1), asked()
    assert isinstance(model, PiZeroFast)
    loss = model(observation)
    chances = model.predictions(observation).softmax(-1)
    for row in range(2):
        surprises = [
            -chances[row, i - 1, observation.tokens[row, i]].log()
            for i in range(1, 8)
            if observation.token_loss[row, i]
        ]
        assert len(surprises) == 3
        torch.testing.assert_close(loss[row], torch.stack(surprises).mean(), **CLOSE)


def test_a_row_with_nothing_to_learn_has_no_loss():
    model, observation = small_speaker("pi0_fast"), asked()
    learnt = observation.token_loss.clone()
    learnt[1] = False
    loss = model(replace(observation, token_loss=learnt))
    assert loss[0] > 0
    assert loss[1] == 0


def test_gradients_equal_finite_differences():
    model, observation = small_speaker("pi0_fast").double(), asked()
    observation = replace(observation, images=observation.images.double())
    model(observation).sum().backward()
    for name in (
        "projector.weight",
        "embedding.weight",
        "joint.mixtures.vlm.blocks.0.q_proj.weight",
    ):
        weight = model.get_parameter(name)
        way = torch.randn_like(weight)
        with torch.no_grad():
            weight += 1e-5 * way
            high = model(observation).sum()
            weight -= 2e-5 * way
            low = model(observation).sum()
            weight += 1e-5 * way
        slope = (high - low) / 2e-5
        # Rotations are float32.
        torch.testing.assert_close((weight.grad * way).sum(), slope, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["paligemma", "pi0_fast"])
def test_what_it_is_answering_does_not_see_the_answer(kind):
    """Other tokens in the answer leave everything before them as it was."""
    model, observation = small_speaker(kind), asked()
    other = observation.tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % VOCAB
    with torch.no_grad():
        before = PaliGemma.forward(model, observation)
        after = PaliGemma.forward(model, replace(observation, tokens=other))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


# --- refusals -------------------------------------------------------------------------------------


def test_refusals():
    model, observation = small_speaker("pi0_fast"), prompt(3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        model.generate(observation, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"temperature must not be negative, got -1"):
        model.generate(observation, max_new_tokens=1, temperature=-1.0)
    with pytest.raises(ValueError, match="needs token_causal and token_loss"):
        model(observation)
    with pytest.raises(ValueError, match=r"'vlm' was built with kv_only_tail.*kv_only_tail: false"):
        small_speaker("paligemma", "model.joint.mixtures.vlm.kv_only_tail=true")
    with pytest.raises(ValueError, match=r"no mixture 'vln'; did you mean 'vlm'\?"):
        small_speaker("paligemma", "+model.vlm=vln")


# --- compilation ----------------------------------------------------------------------------------

COMPILED = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]


@pytest.fixture
def strict():
    """Every recompilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def with_marks(function):
    for mark in COMPILED:
        function = mark(function)
    return function


@with_marks
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_step_is_one_graph_for_every_token(monkeypatch, backend):
    depth = ["model.joint.mixtures.vlm.depth=1"] if backend == "inductor" else []
    model, observation = small_speaker("pi0_fast", *depth), prompt(5, 3)
    expected = model.generate(observation, max_new_tokens=12, keep_logits=True)
    step = torch.compile(model.step, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(model, "step", step)
    got = model.generate(observation, max_new_tokens=12, keep_logits=True)
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)


@with_marks
@pytest.mark.usefixtures("strict")
def test_the_loss_is_one_graph():
    model = small_speaker("pi0_fast")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(2):
        observation = asked()
        torch.testing.assert_close(compiled(observation), model(observation), **CLOSE)


@with_marks
def test_compiled_blocks_speak_the_same():
    torch._dynamo.reset()
    model, observation = small_speaker(), prompt(5, 3)
    expected = model.generate(observation, max_new_tokens=9)
    model.compile_blocks(backend="aot_eager", dynamic=False)
    assert torch.equal(model.generate(observation, max_new_tokens=9).tokens, expected.tokens)
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.generate(prompt(5, 3), max_new_tokens=9)
    torch._dynamo.reset()
