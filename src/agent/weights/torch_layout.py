"""PyTorch checkpoints of the family: openpi's, LeRobot's, giga's, transformers', open-pi-zero's.

Names are in the one spelling of `spelling.py`; every weight matrix is [out in].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pizero.agent.weights.links import Link
from pizero.agent.weights.source import Entry

KINDS = ("weight", "bias")


def vision(node: Mapping[str, Any]) -> Iterator[Link]:
    """SigLIP, with its three projections of a layer in one."""
    for kind in KINDS:
        yield Link(f"vision.patch_embedding.{kind}", f"vision.embeddings.patch_embedding.{kind}")
        yield Link(f"vision.final_norm.{kind}", f"vision.post_layernorm.{kind}")
        yield Link(f"projector.{kind}", f"projector.{kind}")
    yield Link("vision.position_embedding", "vision.embeddings.position_embedding.weight")
    width = node["width"]
    for i in range(node["depth"]):
        ours, theirs = f"vision.blocks.{i}.", f"vision.encoder.layers.{i}."
        for kind in KINDS:
            for j, x in enumerate("qkv"):
                rows = (j * width, (j + 1) * width)
                name = f"{theirs}self_attn.{x}_proj.{kind}"
                yield Link(f"{ours}qkv_proj.{kind}", name, rows=rows)
            for mine, other in (
                ("attention_norm", "layer_norm1"),
                ("o_proj", "self_attn.out_proj"),
                ("mlp_norm", "layer_norm2"),
                ("up_proj", "mlp.fc1"),
                ("down_proj", "mlp.fc2"),
            ):
                yield Link(f"{ours}{mine}.{kind}", f"{theirs}{other}.{kind}")


def mixture(node: Mapping[str, Any], ours: str, theirs: str) -> Iterator[Link]:
    """A Gemma stack with its final norm: keys and values in one matrix, gate and up in another."""
    norm = KINDS[:1] if node["cond_dim"] is None else ("dense.weight", "dense.bias")
    keys, hidden = node["num_kv_heads"] * node["head_dim"], node["mlp_dim"]
    pairs = {"kv_proj": ("self_attn.k_proj", "self_attn.v_proj", keys)}
    pairs["gate_up_proj"] = ("mlp.gate_proj", "mlp.up_proj", hidden)
    for kind in norm:
        yield Link(f"{ours}final_norm.{kind}", f"{theirs}norm.{kind}")
    for i in range(node["depth"]):
        mine, other = f"{ours}blocks.{i}.", f"{theirs}layers.{i}."
        for kind in norm:
            yield Link(f"{mine}attention_norm.{kind}", f"{other}input_layernorm.{kind}")
            yield Link(f"{mine}mlp_norm.{kind}", f"{other}post_attention_layernorm.{kind}")
        for name, (first, second, rows) in pairs.items():
            both = f"{mine}{name}.weight"
            yield Link(both, f"{other}{first}.weight", rows=(0, rows))
            yield Link(both, f"{other}{second}.weight", rows=(rows, 2 * rows))
        for name, where in (("q_proj", "self_attn"), ("o_proj", "self_attn"), ("down_proj", "mlp")):
            yield Link(f"{mine}{name}.weight", f"{other}{where}.{name}.weight")


def flow_heads(node: Mapping[str, Any], *, reverse: bool, time_first: bool) -> Iterator[Link]:
    """State, action and time layers; `reverse` where velocity runs from action to noise."""
    action = node["joint"]["mixtures"]["action"]
    for kind in KINDS:
        yield Link(f"action_encoder.in_proj.{kind}", f"action_in_proj.{kind}")
        yield Link(f"action_decoder.{kind}", f"action_out_proj.{kind}", sign=-1 if reverse else 1)
        if node["state_dim"] is not None:
            yield Link(f"state_encoder.{kind}", f"state_proj.{kind}")
        if action["cond_dim"] is not None:
            yield Link(f"action_encoder.time_in.{kind}", f"time_mlp_in.{kind}")
            yield Link(f"action_encoder.time_out.{kind}", f"time_mlp_out.{kind}")
        else:
            yield Link(f"action_encoder.out_proj.{kind}", f"action_time_mlp_out.{kind}")
    if action["cond_dim"] is None:
        mixed, width = ("time_action" if time_first else "action_time"), action["width"]
        halves = [(slice(None), slice(0, width)), (slice(None), slice(width, 2 * width))]
        first, second = reversed(halves) if time_first else halves
        yield Link("action_encoder.action_mix.weight", f"{mixed}_mlp_in.weight", at=first)
        yield Link("action_encoder.time_mix.weight", f"{mixed}_mlp_in.weight", at=second)
        yield Link("action_encoder.time_mix.bias", f"{mixed}_mlp_in.bias")


def vision_sizes(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """SigLIP's sizes. The number of heads leaves no trace in [out in] matrices: So400m's 72 per
    head is assumed where it divides the width."""
    width, _, patch, _ = entries["vision.embeddings.patch_embedding.weight"].shape
    patches = entries["vision.embeddings.position_embedding.weight"].shape[0]
    return {
        "image_size": math.isqrt(patches) * patch,
        "patch_size": patch,
        "width": width,
        "depth": depth(entries, "vision.encoder.layers."),
        "mlp_dim": entries["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_heads": width // 72 if width % 72 == 0 else None,
    }


def mixture_sizes(entries: Mapping[str, Entry], theirs: str, heads: int | None) -> dict[str, Any]:
    """A Gemma stack's sizes. Heads leave no trace in [out in] matrices: one key head is assumed,
    as all published models have, unless `heads` (of the queries) is given."""
    layer = f"{theirs}layers.0."
    queries, width = entries[f"{layer}self_attn.q_proj.weight"].shape
    keys = entries[f"{layer}self_attn.k_proj.weight"].shape[0]
    head_dim = keys if heads is None else queries // heads
    dense = f"{layer}input_layernorm.dense.weight"
    return {
        "width": width,
        "depth": depth(entries, f"{theirs}layers."),
        "mlp_dim": entries[f"{layer}mlp.gate_proj.weight"].shape[0],
        "num_heads": queries // head_dim,
        "num_kv_heads": keys // head_dim,
        "head_dim": head_dim,
        "cond_dim": entries[dense].shape[1] if dense in entries else None,
    }


def depth(entries: Mapping[str, Entry], prefix: str) -> int:
    """The number of layers below `prefix`."""
    numbers = [n[len(prefix) :].split(".")[0] for n in entries if n.startswith(prefix)]
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)
