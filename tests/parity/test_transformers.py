"""The same numbers as Hugging Face transformers, live, with small random weights."""

from __future__ import annotations

import published
import pytest
import torch
from small_models import (
    SMALL,
    compose_model,
    randomise,
    set_sizes,
    small_observation,
    small_policy,
)
from transformers import (
    GemmaConfig,
    GemmaModel,
    PI0Config,
    PI0ForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.paligemma import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
)

from pizero.agent.config import build
from pizero.model import JointModel, Mixture, PaliGemma, PiZero, Segment, SigLIP, TokenLayout
from pizero.types import Observation

CLOSE = dict(atol=1e-5, rtol=1e-5)
IMAGE = 32  # stands for a picture's token; the first number beyond the vocabulary

VISION = dict(
    hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    image_size=8, patch_size=4, vision_use_head=False,
)  # fmt: skip
VLM = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=1, head_dim=8, vocab_size=IMAGE, pad_token_id=None,
)  # fmt: skip
EXPERT = {**VLM, "hidden_size": 12, "intermediate_size": 20}
PALIGEMMA = dict(
    text_config={**VLM, "model_type": "gemma", "use_bidirectional_attention": True},
    vision_config={**VISION, "model_type": "siglip_vision_model"},
    projection_dim=16,
    image_token_id=IMAGE,
)


def below(prefix: str, module: torch.nn.Module) -> published.Weights:
    weights = module.state_dict()
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}


@torch.no_grad()
def test_siglip():
    theirs = randomise(SiglipVisionModel(SiglipVisionConfig(**VISION)).eval())
    ours = SigLIP(image_size=8, patch_size=4, width=12, depth=2, mlp_dim=20, num_heads=2)
    ours.load_state_dict(published.siglip(theirs.state_dict(), ""))
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    expected = theirs(pixel_values=images).last_hidden_state
    torch.testing.assert_close(ours(images), expected, **CLOSE)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("base", [10_000.0, 100.0])
@torch.no_grad()
def test_gemma(kv_heads, base):
    """One expert alone, in one block: Gemma with a full mask. With padding, at odd positions."""
    rope = dict(rope_type="default", rope_theta=base)
    changes = dict(num_key_value_heads=kv_heads, rope_parameters=rope, attn_implementation="eager")
    theirs = randomise(GemmaModel(GemmaConfig(**{**VLM, **changes})).eval())
    sizes = dict(width=16, depth=2, mlp_dim=24, num_heads=4, head_dim=8)
    mixture = Mixture(**sizes, num_kv_heads=kv_heads, rope_base=base)
    mixture.load_state_dict(published.gemma(theirs.state_dict(), ""))
    x, positions = torch.randn(2, 7, 16), torch.tensor([[3, 4, 5, 9, 10, 11, 40]])
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 2:5] = False
    mask = torch.where(valid, 0.0, torch.finfo(torch.float32).min)[:, None, None].expand(2, 1, 7, 7)
    expected = theirs(inputs_embeds=x, attention_mask=mask, position_ids=positions)
    layout = TokenLayout(Segment("text", 7, 0, "vlm"))
    out, _ = JointModel({"vlm": mixture})({"text": x}, layout, positions=positions, valid=valid)
    torch.testing.assert_close(out["text"], expected.last_hidden_state, **CLOSE)


@torch.no_grad()
def test_gemma_token_by_token():
    """A block for each token is Gemma as it was trained, causal; and so is a cache per token."""
    theirs = randomise(GemmaModel(GemmaConfig(**VLM)).eval())
    mixture = Mixture(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=1, head_dim=8)
    mixture.load_state_dict(published.gemma(theirs.state_dict(), ""))
    joint, x = JointModel({"vlm": mixture}), torch.randn(2, 5, 16)
    expected = theirs(inputs_embeds=x).last_hidden_state
    segments = [Segment(f"token{i}", 1, i, "vlm") for i in range(5)]
    tokens = {s.name: x[:, i : i + 1] for i, s in enumerate(segments)}
    out, _ = joint(tokens, TokenLayout(*segments), positions=torch.arange(5)[None])
    torch.testing.assert_close(torch.cat(list(out.values()), dim=1), expected, **CLOSE)
    kept = None
    for i, s in enumerate(segments):
        at = torch.tensor([[i]])
        out, kept = joint({s.name: tokens[s.name]}, TokenLayout(s), positions=at, cache=kept)
        torch.testing.assert_close(out[s.name], expected[:, i : i + 1], **CLOSE)


@torch.no_grad()
def test_paligemma_prefix():
    """Pictures and words of PaliGemma as a prefix: embeddings and the final hidden states."""
    theirs = randomise(PaliGemmaModel(PaliGemmaConfig(**PALIGEMMA)).eval())
    ours = small_policy("pi0", "model.joint.mixtures.vlm.kv_only_tail=false")
    ours.load_state_dict(from_paligemma(below("", theirs)), strict=False)
    observation = small_observation(ours, cameras=1, text=5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    pictures = torch.full((2, ours.vision.num_tokens), IMAGE)
    seen = torch.cat((torch.ones_like(pictures, dtype=torch.bool), mask), dim=1)
    expected = theirs(
        input_ids=torch.cat((pictures, observation.tokens), dim=1),
        pixel_values=observation.images[:, 0],
        attention_mask=seen.long(),
        token_type_ids=torch.zeros_like(seen, dtype=torch.long),
        position_ids=(seen.cumsum(1) - 1),
    )
    tokens, valid, layout = ours.embed_prefix(with_mask(observation, token_mask=mask))
    tokens.pop("state")
    layout = TokenLayout(*(s for s in layout.segments if s.name != "state"))
    out, _ = ours.joint(tokens, layout, positions=seen.cumsum(1) - 1, valid=valid[:, :-1])
    images = theirs.get_image_features(observation.images[:, 0]).pooler_output
    words = theirs.get_input_embeddings()(observation.tokens)
    torch.testing.assert_close(tokens["image"], images, **CLOSE)
    torch.testing.assert_close(tokens["text"], words, **CLOSE)
    got = torch.cat((out["image"], out["text"]), dim=1)[seen]
    torch.testing.assert_close(got, expected.last_hidden_state[seen], **CLOSE)


@torch.no_grad()
def speaking_pair(seed: int) -> tuple[PaliGemmaForConditionalGeneration, PaliGemma]:
    """A small PaliGemma of transformers, and ours with its weights."""
    text = {**PALIGEMMA["text_config"], "use_bidirectional_attention": False}
    text |= {"vocab_size": IMAGE, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = PaliGemmaConfig(**{**PALIGEMMA, "text_config": text})
    theirs = randomise(PaliGemmaForConditionalGeneration(config).eval(), seed)
    # Small embeddings and loud layers, or the tied head would repeat the last word for ever.
    theirs.get_input_embeddings().weight.mul_(0.1)
    for layer in theirs.model.language_model.layers:
        layer.mlp.down_proj.weight.mul_(3)
    theirs.generation_config.update(pad_token_id=0, eos_token_id=1, bos_token_id=2)
    sizes = {"vision": SMALL["vision"], "joint.mixtures.vlm": SMALL["joint.mixtures.vlm"]}
    ours = build(compose_model("paligemma", *set_sizes(sizes), "model.vocab_size=32"))
    ours.load_state_dict(from_paligemma(below("model.", theirs)))
    return theirs, ours.eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", [1, 3, 5, 11])  # rows that end early, together, never
@torch.no_grad()
def test_generated_text(seed, padded):
    """Greedy tokens and their logits; transformers takes padding on the left, we on either side."""
    theirs, ours = speaking_pair(seed)
    lengths = (6, 4) if padded else (6, 6)
    words = torch.randint(2, IMAGE, (2, 6))
    right = torch.arange(6) < torch.tensor(lengths)[:, None]
    left = right.flip(1)
    images = torch.rand(2, 1, 3, 8, 8) * 2 - 1
    pictures = torch.full((2, ours.vision.num_tokens), IMAGE)
    moved = torch.zeros_like(words).masked_scatter(left, words[right])
    seen = torch.cat((left, torch.ones_like(pictures, dtype=torch.bool)), dim=1)
    # Their padding stands in front of the pictures.
    ids = torch.full_like(seen, IMAGE, dtype=torch.long)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        pad = 6 - length
        ids[row, :pad], mask[row, :pad] = 0, 0
        ids[row, pad + pictures.shape[1] :] = words[row, :length]
    expected = theirs.generate(
        input_ids=ids, pixel_values=images[:, 0], attention_mask=mask,
        token_type_ids=torch.zeros_like(ids), max_new_tokens=12, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = expected.sequences[:, ids.shape[1] :]
    logits = torch.stack(expected.logits, dim=1)
    for text, real in ((words * right, right), (moved, left)):
        observation = Observation(images, text, token_mask=real if padded else None)
        got = ours.generate(observation, max_new_tokens=12, keep_logits=True)
        assert torch.equal(got.tokens[:, : tokens.shape[1]], tokens)
        assert not got.tokens[:, tokens.shape[1] :].any()
        assert got.lengths.max() == tokens.shape[1] == got.logits.shape[1]
        for row, length in enumerate(got.lengths.tolist()):
            torch.testing.assert_close(got.logits[row, :length], logits[row, :length], **CLOSE)
            assert bool(got.ended[row]) == bool((tokens[row] == 1).any())


@torch.no_grad()
def test_logits_of_a_whole_text():
    """Question and answer in one pass: what comes after each word of the answer."""
    theirs, ours = speaking_pair(0)
    images, words = torch.rand(2, 1, 3, 8, 8) * 2 - 1, torch.randint(2, IMAGE, (2, 7))
    answer = torch.arange(7).expand(2, 7) >= torch.tensor([[3], [5]])
    pictures = torch.full((2, ours.vision.num_tokens), IMAGE)
    expected = theirs(
        input_ids=torch.cat((pictures, words), dim=1), pixel_values=images[:, 0],
        attention_mask=torch.ones(2, 11, dtype=torch.long),
        token_type_ids=torch.cat((torch.zeros_like(pictures), answer.long()), dim=1),
    ).logits[:, 4:]  # fmt: skip
    got = ours(Observation(images, words, token_causal=answer))
    torch.testing.assert_close(got, expected, **CLOSE)


def hugging_face_pi0() -> PI0ForConditionalGeneration:
    """A small pi0 of transformers whose time embedding has float64 angles, as ours has."""
    config = PI0Config(
        vlm_config={**PALIGEMMA, "model_type": "paligemma"},
        dit_config={**EXPERT, "model_type": "gemma"},
        chunk_size=5, max_state_dim=3, max_action_dim=3, loss_reduction="none",
    )  # fmt: skip
    model = randomise(PI0ForConditionalGeneration(config).eval())
    period = 0.004 * 1000.0 ** torch.linspace(0, 1, 6, dtype=torch.float64)
    model.embed_action_time.sinusoid_embeds.sinusoid_freq = 2 * torch.pi / period
    return model


def from_paligemma(source: published.Weights) -> published.Weights:
    return {
        **published.below("vision", published.siglip(source, "vision_tower.")),
        **published.linear(source, "multi_modal_projector.linear", "projector"),
        "embedding.weight": source["language_model.embed_tokens.weight"],
        **published.below("joint.mixtures.vlm", published.gemma(source, "language_model.")),
    }


@pytest.fixture(scope="module")
def pair() -> tuple[PI0ForConditionalGeneration, PiZero]:
    theirs = hugging_face_pi0()
    ours = small_policy("pi0", "model.joint.mixtures.vlm.kv_only_tail=false")
    source = below("", theirs)
    ours.load_state_dict(
        {
            **from_paligemma(below("model.vlm.", theirs)),
            **published.below("joint.mixtures.action", published.gemma(source, "model.dit.")),
            **published.mixed_actions(source, "embed_action_time."),
            **published.reversed_flow(source, "action_out_proj"),
        }
    )
    return theirs, ours.eval()


def with_mask(observation: Observation, **masks: torch.Tensor) -> Observation:
    return Observation(observation.images, observation.tokens, state=observation.state, **masks)


def inputs(ours: PiZero, observation: Observation) -> dict[str, torch.Tensor]:
    """An observation as transformers takes it: pictures as tokens in front of the words."""
    cameras = observation.images.shape[1]
    pictures = torch.full((2, cameras * ours.vision.num_tokens), IMAGE)
    seen = torch.cat((torch.ones_like(pictures, dtype=torch.bool), observation.token_mask), dim=1)
    return dict(
        input_ids=torch.cat((pictures, observation.tokens), dim=1),
        pixel_values=observation.images,
        pixel_attention_mask=torch.ones(2, cameras, dtype=torch.bool),
        attention_mask=seen.long(),
        state=observation.state[:, 0],
    )


@pytest.fixture(scope="module")
def observation(pair) -> Observation:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    return with_mask(small_observation(pair[1], cameras=2, text=6), token_mask=mask)


@torch.no_grad()
def test_pi0_loss_and_velocity(pair, observation):
    theirs, ours = pair
    actions, noise = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    time = torch.tensor([0.3, 0.91], dtype=torch.float64)
    expected = theirs(
        **inputs(ours, observation), actions=actions, noise=noise, timestep=1 - time
    )  # fmt: skip
    point = ours.flow.point(noise, actions, time)
    velocity = ours.velocity(ours.prefix(observation), point, time)
    torch.testing.assert_close(velocity, -expected.logits.float(), **CLOSE)
    loss = ours(observation, actions, noise[:, None], time[:, None])[:, 0]
    torch.testing.assert_close(loss, expected.loss.float(), **CLOSE)


@pytest.mark.parametrize("steps", [1, 4, 8])
@torch.no_grad()
def test_pi0_sampled_actions(pair, observation, steps):
    """Step counts whose times float32 holds exactly: the two count time differently."""
    theirs, ours = pair
    noise = torch.randn(2, 5, 3)
    expected = theirs.sample_actions(**inputs(ours, observation), noise=noise, num_steps=steps)
    sampled = ours.sample(observation, noise, steps)
    torch.testing.assert_close(sampled, expected, **CLOSE)
