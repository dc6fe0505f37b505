"""pi0-FAST's logits, loss and decoded tokens against stored numbers of openpi's JAX model."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
import torch
from published import Weights
from safetensors.torch import load_file
from small_models import compose_model, set_sizes

from pizero.agent.config import build
from pizero.model import PiZeroFast
from pizero.types import Observation

FOLDER = Path(__file__).parents[1] / "data" / "fixtures" / "openpi_pi0_fast"
CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")


@cache
def stored() -> tuple[dict, Weights, dict[str, torch.Tensor]]:
    facts = json.loads((FOLDER / "case.json").read_text())
    return facts, load_file(FOLDER / "weights.safetensors"), load_file(FOLDER / "io.safetensors")


def check(name: str, ours: torch.Tensor, where: torch.Tensor | None = None) -> None:
    """Compare with a stored tensor by the first of the case's rules that names it."""
    facts, _, io = stored()
    theirs = io[name]
    assert ours.shape == theirs.shape, name
    rule = next(row for row in facts["tolerance_rows"] if fnmatchcase(name, row["match"]))
    if where is not None:
        ours, theirs = ours[where], theirs[where]
    if rule.get("exact"):
        assert torch.equal(ours, theirs), name
    else:
        limits = dict(atol=rule["atol"], rtol=rule["rtol"])
        torch.testing.assert_close(ours, theirs, **limits, msg=lambda m: f"{name}: {m}")


def make_model(*overrides: str) -> PiZeroFast:
    facts, weights, _ = stored()
    dims = facts["dims"]
    vision = {k: v for k, v in dims["vision"].items() if k != "tokens_per_image"}
    whole = dict(
        vocab_size=dims["vocab_size"],
        horizon=dims["action_horizon"],
        action_dim=dims["action_dim"],
    )
    sizes = {"vision": vision, "joint.mixtures.vlm": dims["vlm"], None: whole}
    model = build(compose_model("pi0_fast", *set_sizes(sizes), *overrides))
    model.load_state_dict(from_jax(weights))
    return model.eval()


def from_jax(source: Weights) -> Weights:
    """openpi's JAX tree: layers stacked, kernels [in, out], heads as axes."""
    image, words = "PaliGemma/img/", "PaliGemma/llm/"
    weights = {
        "vision.patch_embedding.weight": source[f"{image}embedding/kernel"].permute(3, 2, 0, 1),
        "vision.patch_embedding.bias": source[f"{image}embedding/bias"],
        "vision.position_embedding": source[f"{image}pos_embedding"][0],
        "vision.final_norm.weight": source[f"{image}Transformer/encoder_norm/scale"],
        "vision.final_norm.bias": source[f"{image}Transformer/encoder_norm/bias"],
        "projector.weight": source[f"{image}head/kernel"].T,
        "projector.bias": source[f"{image}head/bias"],
        "embedding.weight": source[f"{words}embedder/input_embedding"],
        "joint.mixtures.vlm.final_norm.weight": source[f"{words}final_norm/scale"],
    }
    seen = {k.removeprefix(f"{image}Transformer/encoderblock/"): w for k, w in source.items()}
    attention = "MultiHeadDotProductAttention_0"
    for i in range(len(seen["LayerNorm_0/scale"])):
        qkv = [seen[f"{attention}/{x}/kernel"][i].flatten(1).T for x in ("query", "key", "value")]
        biases = [seen[f"{attention}/{x}/bias"][i].flatten() for x in ("query", "key", "value")]
        block = {
            "qkv_proj.weight": torch.cat(qkv),
            "qkv_proj.bias": torch.cat(biases),
            "o_proj.weight": seen[f"{attention}/out/kernel"][i].flatten(0, 1).T,
            "o_proj.bias": seen[f"{attention}/out/bias"][i],
        }
        for theirs, ours in (("LayerNorm_0", "attention_norm"), ("LayerNorm_1", "mlp_norm")):
            block[f"{ours}.weight"] = seen[f"{theirs}/scale"][i]
            block[f"{ours}.bias"] = seen[f"{theirs}/bias"][i]
        for theirs, ours in (("Dense_0", "up_proj"), ("Dense_1", "down_proj")):
            block[f"{ours}.weight"] = seen[f"MlpBlock_0/{theirs}/kernel"][i].T
            block[f"{ours}.bias"] = seen[f"MlpBlock_0/{theirs}/bias"][i]
        weights |= {f"vision.blocks.{i}.{name}": w for name, w in block.items()}
    layers = {k.removeprefix(f"{words}layers/"): w for k, w in source.items()}
    for i in range(len(layers["pre_attention_norm/scale"])):
        keys, values = layers["attn/kv_einsum/w"][i].transpose(2, 3).flatten(1, 2)
        gate, up = layers["mlp/gating_einsum"][i].mT
        block = {
            "attention_norm.weight": layers["pre_attention_norm/scale"][i],
            "kv_proj.weight": torch.cat((keys, values)),
            "q_proj.weight": layers["attn/q_einsum/w"][i].mT.flatten(0, 1),
            "o_proj.weight": layers["attn/attn_vec_einsum/w"][i].flatten(0, 1).T,
            "mlp_norm.weight": layers["pre_ffw_norm/scale"][i],
            "gate_up_proj.weight": torch.cat((gate, up)),
            "down_proj.weight": layers["mlp/linear"][i].T,
        }
        weights |= {f"joint.mixtures.vlm.blocks.{i}.{name}": w for name, w in block.items()}
    return weights


def observation(kind: str = "in", rows: slice = slice(None)) -> Observation:
    io = stored()[2]
    images = torch.stack([io[f"in.image.{c}"] for c in CAMERAS], dim=1)
    return Observation(
        images=images[rows],
        tokens=io[f"{kind}.tokens"][rows],
        token_mask=io[f"{kind}.token_mask"][rows],
        token_causal=io[f"{kind}.token_ar_mask"][rows].bool(),
        token_loss=io[f"{kind}.token_loss_mask"][rows],
    )


@torch.no_grad()
def test_loss_and_logits():
    model, given = make_model(), observation()
    tokens, _, _ = model.embed(given)
    check("out.input_embs", torch.cat((tokens["image"], tokens["text"]), dim=1))
    check("out.logits", model.predictions(given), given.token_mask[:, :-1])
    loss = model(given)
    check("out.loss", loss)
    check("out.loss_mean", loss.mean()[None])


@pytest.mark.parametrize(("name", "rows"), [("decode", slice(None)), ("decode_row0", slice(1))])
@torch.no_grad()
def test_decoding(name, rows):
    """Tokens and the logits each was taken from; it goes on until all rows end at once."""
    model, steps = make_model(), stored()[0]["decode_steps"]
    got = model.decode(observation("in.decode", rows), max_new_tokens=steps, keep_logits=True)
    check(f"out.{name}.tokens", got.tokens)
    check(f"out.{name}.logits", got.logits)
    alone = name == "decode_row0"
    assert got.ended.tolist() == ([True] if alone else [False, False])
    assert got.lengths.tolist() == ([5] if alone else [14, 14])


@torch.no_grad()
def test_every_stored_number_is_compared():
    compared = {"input_embs", "logits", "loss", "loss_mean"}
    compared |= {f"{x}.{y}" for x in ("decode", "decode_row0") for y in ("tokens", "logits")}
    assert {f"out.{name}" for name in compared} == {k for k in stored()[2] if k.startswith("out.")}


@torch.no_grad()
def test_rows_that_end_alone():
    """The same tokens up to each row's own end, and nothing behind it."""
    steps = stored()[0]["decode_steps"]
    got = make_model("model.stop_together=false").decode(
        observation("in.decode"), max_new_tokens=steps
    )
    theirs = stored()[2]["out.decode.tokens"]
    assert got.lengths.tolist() == [5, 14]
    assert got.ended.tolist() == [True, False]
    assert torch.equal(got.tokens[0], torch.cat((theirs[0, :5], torch.zeros(9, dtype=torch.long))))
    assert torch.equal(got.tokens[1], theirs[1])


@pytest.mark.parametrize(
    ("change", "seen"),
    [("decode_gap=0", "decode"), ("joint.mixtures.vlm.rope_base=100", "loss")],
)
@torch.no_grad()
def test_a_wrong_convention_is_noticed(change, seen):
    model = make_model(f"model.{change}")
    if seen == "decode":
        got = model.decode(observation("in.decode"), max_new_tokens=14)
        assert not torch.equal(got.tokens, stored()[2]["out.decode.tokens"])
    else:
        with pytest.raises(AssertionError, match=r"out\.loss"):
            check("out.loss", model(observation()))


@torch.no_grad()
def test_the_answer_is_causal():
    """With an answer that its prompt can see, the logits are others."""
    given = observation()
    seen = replace(given, token_causal=torch.zeros_like(given.token_causal))
    with pytest.raises(AssertionError, match=r"out\.logits"):
        check("out.logits", make_model().predictions(seen), given.token_mask[:, :-1])


def test_gradients_reach_every_weight():
    model = make_model()
    model(observation()).mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
