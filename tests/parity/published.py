"""Published weights under pizero's names, mapped by hand: the tests' own, and only for tests.

openpi, open-pi-zero and transformers share the layer names of transformers' Gemma and SigLIP.
"""

from __future__ import annotations

import torch

Weights = dict[str, torch.Tensor]


def siglip(source: Weights, prefix: str) -> Weights:
    """A SigLIP tower found below `prefix`."""
    tower = {
        "patch_embedding.weight": source[f"{prefix}embeddings.patch_embedding.weight"],
        "patch_embedding.bias": source[f"{prefix}embeddings.patch_embedding.bias"],
        "position_embedding": source[f"{prefix}embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        tower[f"final_norm.{kind}"] = source[f"{prefix}post_layernorm.{kind}"]
        for i in range(depth(source, f"{prefix}encoder.layers.")):
            theirs, ours = f"{prefix}encoder.layers.{i}.", f"blocks.{i}."
            qkv = [source[f"{theirs}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            tower |= {
                f"{ours}attention_norm.{kind}": source[f"{theirs}layer_norm1.{kind}"],
                f"{ours}qkv_proj.{kind}": torch.cat(qkv),
                f"{ours}o_proj.{kind}": source[f"{theirs}self_attn.out_proj.{kind}"],
                f"{ours}mlp_norm.{kind}": source[f"{theirs}layer_norm2.{kind}"],
                f"{ours}up_proj.{kind}": source[f"{theirs}mlp.fc1.{kind}"],
                f"{ours}down_proj.{kind}": source[f"{theirs}mlp.fc2.{kind}"],
            }
    return tower


def gemma(source: Weights, prefix: str, *, kv_only_tail: bool = False) -> Weights:
    """A Gemma stack found below `prefix`, with plain or adaptive norms."""
    last = depth(source, f"{prefix}layers.") - 1
    stack = norm(source, f"{prefix}norm", "final_norm") if not kv_only_tail else {}
    for i in range(last + 1):
        theirs, ours = f"{prefix}layers.{i}.", f"blocks.{i}."
        kv = [source[f"{theirs}self_attn.{x}_proj.weight"] for x in "kv"]
        stack |= norm(source, f"{theirs}input_layernorm", f"{ours}attention_norm")
        stack[f"{ours}kv_proj.weight"] = torch.cat(kv)
        if kv_only_tail and i == last:
            continue
        gate_up = [source[f"{theirs}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        stack |= norm(source, f"{theirs}post_attention_layernorm", f"{ours}mlp_norm")
        stack |= {
            f"{ours}q_proj.weight": source[f"{theirs}self_attn.q_proj.weight"],
            f"{ours}o_proj.weight": source[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}gate_up_proj.weight": torch.cat(gate_up),
            f"{ours}down_proj.weight": source[f"{theirs}mlp.down_proj.weight"],
        }
    return stack


def norm(source: Weights, theirs: str, ours: str) -> Weights:
    """One norm: its weight, or the dense layer of an adaptive one."""
    kinds = ("weight",) if f"{theirs}.weight" in source else ("dense.weight", "dense.bias")
    return {f"{ours}.{kind}": source[f"{theirs}.{kind}"] for kind in kinds}


def linear(source: Weights, theirs: str, ours: str) -> Weights:
    return {f"{ours}.{kind}": source[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def mixed_actions(source: Weights, prefix: str = "") -> Weights:
    """pi0's state and action layers as openpi and transformers name them: action before time."""
    action_mix, time_mix = source[f"{prefix}action_time_mlp_in.weight"].chunk(2, dim=1)
    return {
        **linear(source, f"{prefix}state_proj", "state_encoder"),
        **linear(source, f"{prefix}action_in_proj", "action_encoder.in_proj"),
        "action_encoder.action_mix.weight": action_mix,
        "action_encoder.time_mix.weight": time_mix,
        "action_encoder.time_mix.bias": source[f"{prefix}action_time_mlp_in.bias"],
        **linear(source, f"{prefix}action_time_mlp_out", "action_encoder.out_proj"),
    }


def reversed_flow(source: Weights, theirs: str) -> Weights:
    """The output layer of a family whose time, and so velocity, runs from action to noise."""
    return {name: -w for name, w in linear(source, theirs, "action_decoder").items()}


def below(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}.{name}": w for name, w in weights.items()}


def depth(source: Weights, prefix: str) -> int:
    """The number of layers below `prefix`."""
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in source if k.startswith(prefix))
