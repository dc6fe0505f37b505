"""Every spelling of published checkpoints gives the same weights; what does not fit is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from small_models import compose_model, small_overrides, small_policy

from pizero.agent.weights import (
    Found,
    Link,
    Links,
    MemorySource,
    inspect,
    load_into,
    load_model,
    open_source,
)
from pizero.agent.weights.convert import OpenpiSource, Ours, in_reading_order
from pizero.agent.weights.folder import model_weights

Tensors = dict[str, torch.Tensor]
# What leaves no trace in [out in] matrices, or not in weights at all.
SIZES = {
    "vision.num_heads": 2,
    "joint.mixtures.vlm.num_heads": 4,
    "joint.mixtures.action.num_heads": 4,
    "horizon": 5,
}
PALIGEMMA = "paligemma_with_expert.paligemma."
EXPERT = "paligemma_with_expert.gemma_expert."
PUBLISHED = Path(__file__).parents[2] / "data" / "fixtures" / "openpi_orbax"
WHOLE = "joint.mixtures.vlm.kv_only_tail=false"


def in_memory(kind: str) -> Found:
    """A small random policy, the last layer of its language model included, as a checkpoint."""
    model = small_policy(kind, f"model.{WHOLE}")
    node = OmegaConf.to_container(compose_model(kind, *small_overrides(kind)), resolve=True)
    weights = model_weights(model)
    links = Links(Link(name, name) for name in weights)
    assert isinstance(node, dict)
    return Found(MemorySource(weights), "pizero", kind, node, links, (), (), ())


def openpi(kind: str) -> Tensors:
    """The same as openpi's PyTorch module names it."""
    source = OpenpiSource(in_memory(kind))
    return {name: source.read(name) for name in in_reading_order(source)}


def loaded(tensors: Tensors, **options) -> Tensors:
    return model_weights(load_model(MemorySource(tensors), overrides=SIZES, **options).model)


def renamed(*rules: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """Names under which some project stores openpi's tensors, by regular expressions."""

    def rename(tensors: Tensors) -> Tensors:
        out = {}
        for name, tensor in tensors.items():
            for pattern, to in rules:
                name = re.sub(pattern, to, name)
            out[name] = tensor
        return out

    return rename


def with_both_heads(tensors: Tensors) -> Tensors:
    """LeRobot's later files hold the embedding and an untied head that nothing reads."""
    head = f"{PALIGEMMA}lm_head.weight"
    embedding = f"{PALIGEMMA}model.language_model.embed_tokens.weight"
    return {**tensors, embedding: tensors[head], head: torch.zeros_like(tensors[head])}


def with_old_statistics(tensors: Tensors) -> Tensors:
    """LeRobot's first pi0 kept its statistics among the weights."""
    return {**tensors, "normalize_inputs.buffer_observation_state.mean": torch.zeros(3)}


L, V = f"{PALIGEMMA}model.language_model.", f"{PALIGEMMA}model.vision_tower.vision_model."
GIGA = "paligemma_with_expert."
SPELLINGS: dict[str, list[Callable[[Tensors], Tensors]]] = {
    "compiled": [renamed((r"^", "_orig_mod."))],
    "compiled, in DDP": [renamed((r"^", "module._orig_mod."))],
    "LeRobot, saved": [with_both_heads, renamed((r"^", "model."))],
    "LeRobot, first": [
        renamed(
            (
                rf"^{re.escape(PALIGEMMA)}model\.language_model\.",
                f"{PALIGEMMA}language_model.model.",
            ),
            (rf"^{re.escape(PALIGEMMA)}lm_head", f"{PALIGEMMA}language_model.lm_head"),
            (rf"^{re.escape(PALIGEMMA)}model\.", PALIGEMMA),
            (r"^", "model."),
        ),
        with_old_statistics,
    ],
    "transformers, saved": [
        renamed(
            (re.escape(f"{PALIGEMMA}lm_head."), f"{L}model.embed_tokens."),
            (re.escape(L) + "(layers|norm)", rf"{L}model.\1"),
            (re.escape(V), f"{PALIGEMMA}model.vision_tower."),
        )
    ],
    "transformers, in memory": [
        renamed(
            (re.escape(f"{PALIGEMMA}lm_head."), "model.vlm.language_model.embed_tokens."),
            (re.escape(V), "model.vlm.vision_tower."),
            (re.escape(f"{PALIGEMMA}model."), "model.vlm."),
            (re.escape(f"{EXPERT}lm_head."), "model.dit.embed_tokens."),
            (re.escape(f"{EXPERT}model."), "model.dit."),
            (r"^(state_proj|action_in_proj|action_time_mlp_\w+)", r"embed_action_time.\1"),
        )
    ],
    "giga": [
        renamed(
            (re.escape(f"{PALIGEMMA}lm_head."), f"{GIGA}embed_tokens."),
            (re.escape(V), f"{GIGA}vision_tower."),
            (re.escape(f"{PALIGEMMA}model.multi"), f"{GIGA}multi"),
            (re.escape(L) + r"norm\.", f"{GIGA}norms.0."),
            (re.escape(f"{EXPERT}model.") + r"norm\.", f"{GIGA}norms.1."),
            *(
                rule
                for i, root in enumerate((L, f"{EXPERT}model."))
                for rule in (
                    (re.escape(root) + r"(layers\.\d+\.self_attn\.\w_proj)", rf"{GIGA}\1.{i}"),
                    (re.escape(root) + r"(layers\.\d+)\.mlp\.", rf"{GIGA}\1.mlps.{i}."),
                    (re.escape(root) + r"(layers\.\d+\.\w+_layernorm)\.", rf"{GIGA}\1s.{i}."),
                )
            ),
        ),
        lambda tensors: {k: t for k, t in tensors.items() if k != f"{EXPERT}lm_head.weight"},
    ],
}


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_weights(spelling, kind):
    tensors = openpi(kind)
    expected = {n: t for n, t in in_memory(kind).source._tensors.items()}
    for step in SPELLINGS[spelling]:
        tensors = step(tensors)
    got = loaded(tensors)
    assert got.keys() < expected.keys()  # all but the language model's tail
    assert all("vlm.blocks.1" in n or "vlm.final_norm" in n for n in expected.keys() - got.keys())
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_openpi_and_back_is_the_identity(kind):
    """Every tensor, those that a policy does not read too."""
    tensors = openpi(kind)
    ours = Ours(inspect(MemorySource(tensors), overrides=SIZES))
    expected = in_memory(kind).source._tensors
    assert ours.entries.keys() == expected.keys()
    for name in ours.entries:
        torch.testing.assert_close(ours.read(name), expected[name], rtol=0, atol=0, msg=name)


def test_other_conventions_are_not_written_as_openpis():
    found = in_memory("pi0")
    found.model["joint"]["softcap"] = 50.0
    found.model["joint"]["mixtures"]["action"]["rope_base"] = 100.0
    with pytest.raises(ValueError, match=r"softcap 50.0 .*; rope_base \[100.0, 10000.0\]"):
        OpenpiSource(found)


def test_paligemma_of_transformers(tmp_path):
    """Sharded files as `save_pretrained` writes them, and the names a model in memory has."""
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.models.paligemma import PaliGemmaConfig

    language = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=32, model_type="gemma", pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    eyes = dict(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, vision_use_head=False, model_type="siglip_vision_model",
    )  # fmt: skip
    config = PaliGemmaConfig(
        text_config=language, vision_config=eyes, projection_dim=16, image_token_id=31
    )
    theirs = PaliGemmaForConditionalGeneration(config)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    result = load_model(tmp_path)
    assert result.found.kind == "paligemma"
    mixture = result.model.joint.mixtures["vlm"]
    assert (mixture.num_heads, mixture.num_kv_heads, mixture.rope_base) == (4, 2, 500.0)
    assert result.model.vision.blocks[0].num_heads == 2
    stored = {n: t for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    sizes = {"vision.num_heads": 2, "joint.mixtures.vlm.num_heads": 4}
    again = load_model(MemorySource(stored), overrides=sizes).model
    for name, tensor in model_weights(result.model).items():
        torch.testing.assert_close(tensor, model_weights(again)[name], rtol=0, atol=0)
    fast = load_model(tmp_path, kind="pi0_fast", overrides={"horizon": 8, "action_dim": 7})
    assert (type(fast.model).__name__, fast.model.action_dim) == ("PiZeroFast", 7)


# -- the report ------------------------------------------------------------------------------------


def test_the_report_accounts_for_every_tensor():
    tensors = openpi("pi0")
    result = load_model(MemorySource(tensors), overrides=SIZES)
    report, model = result.report, result.model
    assert report.parameters == sum(p.numel() for p in model.parameters())
    counted = sum(e.loaded + e.renamed + e.merged for e in report.experts.values())
    assert counted == len(list(model.parameters()))
    groups = {"vision": (model.vision, model.projector), "vlm": (model.joint.mixtures["vlm"],)}
    for name, modules in groups.items():
        weights = [p for m in modules for p in m.parameters()]
        weights += [model.embedding.weight] if name == "vlm" else []
        norm = torch.cat([p.flatten() for p in weights]).norm().item()
        assert report.experts[name].norm == pytest.approx(norm, rel=1e-6)
        assert report.experts[name].dtypes == {torch.float32}
    stored = sum(t.numel() for t in tensors.values())
    assert report.parameters + report.left_out_parameters == stored
    text = str(report)
    assert "the action expert's word head: read by nothing" in text
    assert "of the language model's last layer" in text


def test_precision_is_kept_and_small_layers_stay_wide():
    tensors = {name: t.bfloat16() for name, t in openpi("pi05").items()}
    model = load_model(MemorySource(tensors), overrides=SIZES).model
    narrow = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert "joint.mixtures.vlm.blocks.0.kv_proj.weight" in narrow
    assert "vision.blocks.0.qkv_proj.weight" in narrow
    wide = {n for n, _ in model.named_parameters()} - narrow
    assert "joint.mixtures.action.blocks.0.attention_norm.dense.weight" in wide
    assert "vision.patch_embedding.weight" in wide
    assert "action_decoder.weight" in wide
    double = load_model(MemorySource(tensors), overrides=SIZES, dtype=torch.float64).model
    assert {p.dtype for p in double.parameters()} == {torch.float64}


def test_a_language_model_starts_a_policy():
    """Eyes and words from PaliGemma, the action expert as it was; nothing else may be missing."""
    tensors = openpi("pi0")
    only = {n: t for n, t in tensors.items() if n.startswith(PALIGEMMA)}
    policy = small_policy("pi0", seed=7)
    before = {n: t.clone() for n, t in model_weights(policy).items()}
    sizes = {key: SIZES[key] for key in ("vision.num_heads", "joint.mixtures.vlm.num_heads")}
    found = inspect(MemorySource(only), overrides=sizes)
    report = load_into(policy, found, may_initialise=True)
    expected = in_memory("pi0").source._tensors
    for name, tensor in model_weights(policy).items():
        own = name.startswith(("action_", "state_", "joint.mixtures.action"))
        assert torch.equal(tensor, before[name] if own else expected[name]), name
    assert report.experts["action"].initialised == len(report.initialised) > 10
    with pytest.raises(
        ValueError, match=r"26 places:\n  joint.mixtures.action.blocks.0.att.*missing"
    ):
        load_into(policy, found)


# -- what is refused -------------------------------------------------------------------------------

NORM = f"{EXPERT}model.layers.1.input_layernorm.weight"


def test_what_does_not_fit_is_named_with_the_nearest_name():
    tensors = openpi("pi0")
    tensors[NORM.replace("layernorm", "layer_norm")] = tensors.pop(NORM)
    tensors["action_in_proj.bias"] = torch.zeros(99)
    with pytest.raises(ValueError, match="does not fit in 3 places") as caught:
        loaded(tensors)
    text = str(caught.value)
    near = NORM.replace("layernorm", "layer_norm")
    assert f"{near}: not explained; nearest: {NORM}" in text
    assert f"{NORM}: missing; nearest: {near}" in text
    assert (
        "action_in_proj.bias: shape [99] does not give [12] of action_encoder.in_proj.bias" in text
    )


def test_two_names_for_one_tensor_are_refused():
    tensors = openpi("pi0")
    tensors["module.state_proj.bias"] = tensors["state_proj.bias"]
    with pytest.raises(ValueError, match=r"two stored tensors mean the same one: state_proj.bias"):
        loaded(tensors)


def test_numbers_that_are_not_finite_are_refused():
    tensors = openpi("pi0")
    tensors["state_proj.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"state_proj.weight holds numbers that are not finite"):
        loaded(tensors)


def test_an_unknown_override_is_told_the_nearest():
    with pytest.raises(ValueError, match="no 'horison' to override; did you mean 'horizon'"):
        inspect(MemorySource(openpi("pi0")), overrides={"horison": 5})


def test_adapters_are_not_taken_for_weights():
    tensors = {f"base_model.model.{NORM[:-7]}.lora_A.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"holds LoRA adapters .* merge them first"):
        loaded(tensors)


# -- openpi's JAX tree -----------------------------------------------------------------------------


def test_one_projection_of_all_three():
    """openpi's form where there are as many key heads as query heads, as it evaluates it."""
    tensors = {n: t.clone() for n, t in saved_by_openpi().items()}
    generator = torch.Generator().manual_seed(0)
    attn = "PaliGemma/llm/layers/attn/"
    for suffix in ("", "_1"):
        layers, heads, width, head_dim = tensors.pop(f"{attn}q_einsum{suffix}/w").shape
        del tensors[f"{attn}kv_einsum{suffix}/w"]
        shape = (layers, 3, heads, width, head_dim)
        together = torch.randn(shape, generator=generator) / width**0.5
        tensors[f"{attn}qkv_einsum{suffix}/w"] = together
    expert = load_model(MemorySource(tensors)).model.joint.mixtures["action"]
    assert expert.num_kv_heads == expert.num_heads == heads
    block = expert.blocks[1]
    x = torch.randn(5, width, generator=generator)
    w = tensors[f"{attn}qkv_einsum_1/w"][1]
    q, k, v = torch.einsum("td,qndh->qtnh", x, w).flatten(2)
    torch.testing.assert_close(block.q_proj(x), q, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block.kv_proj(x), torch.cat((k, v), dim=1), atol=1e-5, rtol=1e-5)


def saved_by_openpi() -> Tensors:
    source = open_source(PUBLISHED / "checkpoint")
    return {name: source.read(name) for name in source.entries}


def test_lora_leaves_are_merged_by_openpis_rules():
    """Against the layers as openpi evaluates them: base and adapter side by side."""
    tensors = saved_by_openpi()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    rank, root = 3, "PaliGemma/llm/layers/"
    adapted = dict(tensors)
    for suffix in ("", "_1"):
        for name in ("q_einsum", "kv_einsum", "attn_vec_einsum"):
            leaf = f"{root}attn/{name}{suffix}"
            *heads, rows, columns = tensors[f"{leaf}/w"].shape
            adapted[f"{leaf}/lora_a"] = random(*heads, rows, rank)
            adapted[f"{leaf}/lora_b"] = random(*heads, rank, columns)
        for name in ("gating_einsum", "linear"):
            leaf = f"{root}mlp{suffix}/{name}"
            *heads, rows, columns = tensors[leaf].shape
            adapted[f"{leaf}_lora_a"] = random(*heads, rows, rank)
            adapted[f"{leaf}_lora_b"] = random(*heads, rank, columns)
    scale = 1.5
    scales = {"lora.vlm.scale": 4.0, "lora.action.scale": scale}
    result = load_model(MemorySource(adapted), overrides={"horizon": 6} | scales)
    assert result.report.adapted == 10
    block = result.model.joint.mixtures["action"].blocks[1]
    x = random(5, block.q_proj.in_features)
    q, a, b = (adapted[f"{root}attn/q_einsum_1/{x}"][1] for x in ("w", "lora_a", "lora_b"))
    expected = torch.einsum("td,ndh->tnh", x, q)
    expected += scale * torch.einsum("tnl,nlh->tnh", torch.einsum("td,ndl->tnl", x, a), b)
    torch.testing.assert_close(block.q_proj(x), expected.flatten(1), atol=1e-5, rtol=1e-5)
    o, a, b = (adapted[f"{root}attn/attn_vec_einsum_1/{x}"][1] for x in ("w", "lora_a", "lora_b"))
    heads = random(5, *o.shape[:2])
    expected = torch.einsum("tnh,nhd->td", heads, o)
    expected += scale * torch.einsum("tl,nld->td", torch.einsum("tnh,nhl->tl", heads, a), b)
    torch.testing.assert_close(block.o_proj(heads.flatten(1)), expected, atol=1e-5, rtol=1e-5)
    w, a, b = (adapted[f"{root}mlp_1/linear{x}"][1] for x in ("", "_lora_a", "_lora_b"))
    hidden = random(5, w.shape[0])
    expected = hidden @ w + (hidden @ a) @ b  # openpi scales attention only
    torch.testing.assert_close(block.down_proj(hidden), expected, atol=1e-5, rtol=1e-5)
    assert "no adapters here" in inspect(MemorySource(tensors), overrides=scales).notes[0]
    del adapted[f"{root}attn/q_einsum/w"]
    with pytest.raises(ValueError, match=r"LoRA leaves .* without .*q_einsum/w"):
        inspect(MemorySource(adapted))


def test_a_delta_on_a_rounded_base_is_rounded_once():
    """openpi's adapted checkpoints keep what was frozen in bfloat16."""
    leaf = "PaliGemma/llm/layers/mlp/linear"
    tensors = {n: t.bfloat16() if "/llm/" in n else t for n, t in saved_by_openpi().items()}
    layers, hidden, width = tensors[leaf].shape
    a, b = torch.full((layers, hidden, 2), 2.0**-10), torch.full((layers, 2, width), 2.0**-6)
    tensors |= {f"{leaf}_lora_a": a, f"{leaf}_lora_b": b}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(MemorySource(tensors), dtype=dtype, overrides={"horizon": 6}).model
        got = model.joint.mixtures["vlm"].blocks[0].down_proj.weight
        assert torch.equal(got, (tensors[leaf][0].float() + 2.0**-15).T.to(dtype))


def test_adapters_of_open_pi_zero_are_merged():
    """Its layers keep A and B beside their weight, without a scale."""
    from safetensors.torch import load_file

    tensors = load_file(PUBLISHED.parent / "open_pi_zero" / "weights.safetensors")
    name = "joint_model.mixtures.vlm.layers.1.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    rows, columns = tensors[f"{name}.weight"].shape
    a, b = (torch.randn(s, generator=generator) for s in ((3, columns), (rows, 3)))
    adapted = tensors | {f"{name}.lora_A": a, f"{name}.lora_B": b}
    model = load_model(MemorySource(adapted), overrides={"vision.num_heads": 4}).model
    got = model.joint.mixtures["vlm"].blocks[1].q_proj.weight
    torch.testing.assert_close(got, tensors[f"{name}.weight"] + b @ a)
    del adapted[f"{name}.weight"]
    with pytest.raises(ValueError, match=r"LoRA leaves .*lora_B'\] without .*q_proj.weight"):
        inspect(MemorySource(adapted))
