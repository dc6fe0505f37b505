"""openpi's JAX parameter tree: layers stacked on the first axis, kernels [in out].

Names are key paths joined with "/", `_1` marks the action expert. LoRA leaves are merged before
(`lora.py`), so a tree has base weights only here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pizero.agent.weights.links import Link
from pizero.agent.weights.source import Entry

IMG, LLM = "PaliGemma/img/", "PaliGemma/llm/"
LAYER = f"{IMG}Transformer/encoderblock/"
ATTENTION = f"{LAYER}MultiHeadDotProductAttention_0/"


def vision(node: Mapping[str, Any]) -> Iterator[Link]:
    """SigLIP; its "head" is the projector."""
    patch = "kh kw c o -> o c kh kw"
    yield Link("vision.patch_embedding.weight", f"{IMG}embedding/kernel", patch)
    yield Link("vision.patch_embedding.bias", f"{IMG}embedding/bias")
    yield Link("vision.position_embedding", f"{IMG}pos_embedding", at=(0,))
    yield Link("vision.final_norm.weight", f"{IMG}Transformer/encoder_norm/scale")
    yield Link("vision.final_norm.bias", f"{IMG}Transformer/encoder_norm/bias")
    yield from linear("projector", f"{IMG}head")
    width = node["width"]
    for i in range(node["depth"]):
        ours, at = f"vision.blocks.{i}.", (i,)
        for j, x in enumerate(("query", "key", "value")):
            both, rows = f"{ours}qkv_proj.", (j * width, (j + 1) * width)
            yield Link(
                f"{both}weight", f"{ATTENTION}{x}/kernel", "i h d -> (h d) i", at=at, rows=rows
            )
            yield Link(f"{both}bias", f"{ATTENTION}{x}/bias", "h d -> (h d)", at=at, rows=rows)
        yield Link(f"{ours}o_proj.weight", f"{ATTENTION}out/kernel", "h d o -> o (h d)", at=at)
        yield Link(f"{ours}o_proj.bias", f"{ATTENTION}out/bias", at=at)
        for mine, other in (("attention_norm", "LayerNorm_0"), ("mlp_norm", "LayerNorm_1")):
            yield Link(f"{ours}{mine}.weight", f"{LAYER}{other}/scale", at=at)
            yield Link(f"{ours}{mine}.bias", f"{LAYER}{other}/bias", at=at)
        yield from linear(f"{ours}up_proj", f"{LAYER}MlpBlock_0/Dense_0", at=at)
        yield from linear(f"{ours}down_proj", f"{LAYER}MlpBlock_0/Dense_1", at=at)


def mixture(node: Mapping[str, Any], ours: str, suffix: str) -> Iterator[Link]:
    """A Gemma stack with its final norm; `suffix` is "" or "_1"."""
    layers, adaptive = f"{LLM}layers/", node["cond_dim"] is not None
    keys, hidden = node["num_kv_heads"] * node["head_dim"], node["mlp_dim"]
    for mine, theirs, at in _norms(node["depth"], ours, suffix):
        if adaptive:
            yield from linear(f"{mine}.dense", f"{theirs}/Dense_0", at=at)
        else:
            yield Link(f"{mine}.weight", f"{theirs}/scale", at=at)
    together = node["num_heads"] == node["num_kv_heads"]  # then openpi keeps all three in one
    q, kv = ("qkv", "qkv") if together else ("q", "kv")
    q, kv, o = (f"{layers}attn/{x}_einsum{suffix}/w" for x in (q, kv, "attn_vec"))
    for i in range(node["depth"]):
        mine = f"{ours}blocks.{i}."
        mlp = f"{layers}mlp{suffix}/"
        at = (i, 0) if together else (i,)
        yield Link(f"{mine}q_proj.weight", q, "h i d -> (h d) i", at=at)
        yield Link(f"{mine}o_proj.weight", o, "h d o -> o (h d)", at=(i,))
        yield Link(f"{mine}down_proj.weight", f"{mlp}linear", "i o -> o i", at=(i,))
        for j in (0, 1):
            rows, at = (j * keys, (j + 1) * keys), (i, j + together)
            yield Link(f"{mine}kv_proj.weight", kv, "g i d -> (g d) i", at=at, rows=rows)
            rows = (j * hidden, (j + 1) * hidden)
            gates = f"{mlp}gating_einsum"
            yield Link(f"{mine}gate_up_proj.weight", gates, "i o -> o i", at=(i, j), rows=rows)


def flow_heads(node: Mapping[str, Any]) -> Iterator[Link]:
    """State, action and time layers; action comes before time, and time runs backwards."""
    action = node["joint"]["mixtures"]["action"]
    yield from linear("action_encoder.in_proj", "action_in_proj")
    yield from linear("action_decoder", "action_out_proj", sign=-1)
    if node["state_dim"] is not None:
        yield from linear("state_encoder", "state_proj")
    if action["cond_dim"] is not None:
        yield from linear("action_encoder.time_in", "time_mlp_in")
        yield from linear("action_encoder.time_out", "time_mlp_out")
        return
    yield from linear("action_encoder.out_proj", "action_time_mlp_out")
    width, mixed = action["width"], "action_time_mlp_in/kernel"
    for name, start in (("action_mix", 0), ("time_mix", width)):
        rows = (slice(start, start + width),)
        yield Link(f"action_encoder.{name}.weight", mixed, "i o -> o i", at=rows)
    yield Link("action_encoder.time_mix.bias", "action_time_mlp_in/bias")


def linear(ours: str, theirs: str, *, at: tuple[int, ...] = (), sign: int = 1) -> Iterator[Link]:
    """A dense layer: its kernel transposed, its bias as it is."""
    yield Link(f"{ours}.weight", f"{theirs}/kernel", "i o -> o i", at=at, sign=sign)
    yield Link(f"{ours}.bias", f"{theirs}/bias", at=at, sign=sign)


def vision_sizes(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """SigLIP's sizes."""
    patch, _, _, width = entries[f"{IMG}embedding/kernel"].shape
    patches = entries[f"{IMG}pos_embedding"].shape[1]
    depth, _, heads, _ = entries[f"{ATTENTION}query/kernel"].shape
    return {
        "image_size": math.isqrt(patches) * patch,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "mlp_dim": entries[f"{LAYER}MlpBlock_0/Dense_0/kernel"].shape[2],
        "num_heads": heads,
    }


def mixture_sizes(entries: Mapping[str, Entry], suffix: str) -> dict[str, Any]:
    """A Gemma stack's sizes; heads are axes of their own here."""
    attn = f"{LLM}layers/attn/"
    if (together := entries.get(f"{attn}qkv_einsum{suffix}/w")) is not None:
        depth, _, heads, width, head_dim = together.shape
        keys = heads
    else:
        depth, heads, width, head_dim = entries[f"{attn}q_einsum{suffix}/w"].shape
        keys = entries[f"{attn}kv_einsum{suffix}/w"].shape[2]
    dense = f"{LLM}layers/pre_attention_norm{suffix}/Dense_0/kernel"
    return {
        "width": width,
        "depth": depth,
        "mlp_dim": entries[f"{LLM}layers/mlp{suffix}/gating_einsum"].shape[3],
        "num_heads": heads,
        "num_kv_heads": keys,
        "head_dim": head_dim,
        "cond_dim": entries[dense].shape[1] if dense in entries else None,
    }


def _norms(depth: int, ours: str, suffix: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield f"{ours}final_norm", f"{LLM}final_norm{suffix}", ()
    for i in range(depth):
        attention, mlp = (f"{LLM}layers/pre_{x}_norm{suffix}" for x in ("attention", "ffw"))
        yield f"{ours}blocks.{i}.attention_norm", attention, (i,)
        yield f"{ours}blocks.{i}.mlp_norm", mlp, (i,)
