"""Who takes part in the inference benchmark: ways to run the same weights on the same inputs.

A contender is built from a pizero model and says how to go from an observation and noise, both on
the device, to actions on the device. `contender` raises `Unavailable`, with the reason, where
something is not installed or does not apply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from bench.workloads import Workload, siglip
from pizero.model import MixedActionEncoder, Mixture, PiZero, RMSNorm, SigLIP
from pizero.types import Observation, Tensor

Sample = Callable[[Observation, Tensor], Tensor]


class Unavailable(Exception):
    """A contender cannot take part here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """`sample` maps an observation and noise to actions, all on the device."""

    name: str
    sample: Sample


@dataclass(frozen=True)
class Setting:
    """What all contenders of a run share. `example` has the shapes they will be given."""

    workload: Workload
    model: PiZero
    example: tuple[Observation, Tensor]
    num_steps: int
    dtype: torch.dtype
    compile_mode: str


def contender(name: str, setting: Setting) -> Contender:
    """Build one contender by name, ready to be called."""
    if name not in CONTENDERS:
        raise ValueError(f"no contender {name!r}; known: {', '.join(CONTENDERS)}")
    return Contender(name, CONTENDERS[name](setting))


def eager(setting: Setting) -> Sample:
    """pizero as it is."""
    return lambda observation, noise: setting.model.sample(observation, noise, setting.num_steps)


def compiled(setting: Setting) -> Sample:
    """pizero, the whole call compiled into one graph."""
    call = torch.compile(eager(setting), fullgraph=True, dynamic=False, mode=setting.compile_mode)
    call(*setting.example)
    return call


def captured(setting: Setting) -> Sample:
    """pizero, compiled, and the whole call replayed as one CUDA graph."""
    if not torch.cuda.is_available() or setting.example[1].device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    call = compiled(setting)
    observation, noise = _clone(setting.example[0]), setting.example[1].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(observation, noise)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actions = call(observation, noise)

    def replay(new_observation: Observation, new_noise: Tensor) -> Tensor:
        for target, source in zip(_tensors(observation), _tensors(new_observation), strict=True):
            target.copy_(source, non_blocking=True)
        noise.copy_(new_noise, non_blocking=True)
        graph.replay()
        return actions

    return replay


def transformers_blocks(setting: Setting) -> Sample:
    """`PI0ForConditionalGeneration` of transformers with the same weights: SDPA, eager."""
    try:
        from transformers import PI0ForConditionalGeneration
    except ImportError as error:
        raise Unavailable(f"transformers with pi0 is not installed ({error})") from error
    model, workload = setting.model, setting.workload
    if model.state_dim is None:
        raise Unavailable("transformers has pi0 but not pi0.5")
    device = setting.example[1].device
    with torch.device(device):
        theirs: Any = PI0ForConditionalGeneration(_transformers_config(model)).eval()
    load_transformers(theirs, model)
    theirs.to(setting.dtype)
    # The time's frequencies are a buffer, which the cast has rounded.
    frequencies = theirs.embed_action_time.sinusoid_embeds
    frequencies.sinusoid_freq = frequencies.compute_freqs(theirs.config).to(device)
    image_token = theirs.config.vlm_config.image_token_id
    num_image_tokens = workload.num_cameras * model.vision.num_tokens

    def call(observation: Observation, noise: Tensor) -> Tensor:
        assert observation.state is not None
        rows = noise.shape[0]
        pictures = torch.full((rows, num_image_tokens), image_token, device=device)
        ids = torch.cat((pictures, observation.tokens), dim=1)
        return theirs.sample_actions(
            state=observation.state[:, 0].to(setting.dtype),
            input_ids=ids,
            # Without a mask the prefix counts positions from one, but the actions from zero.
            attention_mask=torch.ones_like(ids),
            pixel_values=(observation.images.float() / 127.5 - 1).to(setting.dtype),
            pixel_attention_mask=observation.images.new_ones(
                rows, workload.num_cameras, dtype=torch.bool
            ),
            noise=noise.to(setting.dtype),
            num_steps=setting.num_steps,
        ).float()

    return call


def lerobot(setting: Setting) -> Sample:
    """LeRobot's pi0 with the same weights, eager, at full size only: its sizes are fixed."""
    try:
        # Not a dependency: its pins exclude the versions of torch and transformers used here.
        configuration: Any = import_module("lerobot.policies.pi0.configuration_pi0")
        modeling: Any = import_module("lerobot.policies.pi0.modeling_pi0")
    except (ImportError, ValueError) as error:
        raise Unavailable(f"lerobot cannot be imported ({error})") from error
    model = setting.model
    if model.state_dim is None or model.joint.depth != 18:
        raise Unavailable("lerobot takes part in pi0 at full size only")
    device = setting.example[1].device
    config = configuration.PI0Config(
        chunk_size=model.horizon,
        n_action_steps=model.horizon,
        dtype="float32" if setting.dtype is torch.float32 else "bfloat16",
        device=str(device),
    )
    theirs = modeling.PI0Pytorch(config).to(device).eval()
    own = dict(theirs.named_parameters())
    for name, value in transformers_weights(model):
        for ours, their_prefix in (
            ("model.vlm.", "paligemma_with_expert.paligemma.model."),
            ("model.dit.", "paligemma_with_expert.gemma_expert.model."),
            ("embed_action_time.", ""),
        ):
            if name.startswith(ours):
                name = their_prefix + name.removeprefix(ours)
        if name not in own:
            raise Unavailable(f"this version of lerobot has no weight {name!r}")
        own[name].data.copy_(value)

    def call(observation: Observation, noise: Tensor) -> Tensor:
        assert observation.state is not None
        images = observation.images.float() / 127.5 - 1
        present = torch.ones(len(images), dtype=torch.bool, device=device)
        return theirs.sample_actions(
            list(images.unbind(1)),
            [present] * images.shape[1],
            observation.tokens,
            torch.ones_like(observation.tokens, dtype=torch.bool),
            observation.state[:, 0],
            noise=noise,
            num_steps=setting.num_steps,
        ).float()

    return call


CONTENDERS: dict[str, Callable[[Setting], Sample]] = {
    "pizero-eager": eager,
    "pizero-compiled": compiled,
    "pizero-graph": captured,
    "transformers": transformers_blocks,
    "lerobot": lerobot,
}


def load_transformers(theirs: nn.Module, model: PiZero) -> None:
    """Copy a pizero model's weights into the pi0 of transformers; refuses what is unexplained.

    What stays as it was is what nobody reads: the tail of the vlm's last layer, its final norm, and
    the action expert's unused token embedding.
    """
    own = dict(theirs.named_parameters())
    last = f"layers.{model.joint.depth - 1}."
    unread = re.compile(
        rf"model\.dit\.embed_tokens|model\.vlm\.language_model\.(norm\.|{re.escape(last)}"
        r"(self_attn\.[qo]_proj|mlp|post_attention_layernorm))"
    )
    for name, value in transformers_weights(model):
        if name not in own:
            raise ValueError(f"transformers has no weight {name!r}")
        target = own.pop(name)
        if target.shape != value.shape:
            raise ValueError(f"{name}: {tuple(target.shape)} there, {tuple(value.shape)} here")
        target.data.copy_(value)
    if left := [name for name in own if not unread.match(name)]:
        raise ValueError(f"no weights for {left}")


def transformers_weights(model: PiZero) -> Iterator[tuple[str, Tensor]]:
    """The weights of a pi0 under the names of transformers.

    There, time runs from action to noise, so the velocity has the other sign; one matrix takes the
    concatenated action and time, whose halves are our two mixes.
    """
    vlm, action = model.joint.mixtures[model.vlm], model.joint.mixtures[model.action]
    yield from _siglip(siglip(model), "model.vlm.vision_tower.")
    yield from _linear(model.projector, "model.vlm.multi_modal_projector.linear.")
    yield "model.vlm.language_model.embed_tokens.weight", model.embedding.weight
    yield from _gemma(vlm, "model.vlm.language_model.")
    yield from _gemma(action, "model.dit.")
    encoder, e = model.action_encoder, "embed_action_time."
    assert isinstance(encoder, MixedActionEncoder)
    yield from _linear(model.state_encoder, f"{e}state_proj.")
    yield from _linear(encoder.in_proj, f"{e}action_in_proj.")
    mixes = (encoder.action_mix.weight, encoder.time_mix.weight)
    yield f"{e}action_time_mlp_in.weight", torch.cat(mixes, dim=1)
    yield f"{e}action_time_mlp_in.bias", encoder.time_mix.bias
    yield from _linear(encoder.out_proj, f"{e}action_time_mlp_out.")
    yield "action_out_proj.weight", -model.action_decoder.weight
    yield "action_out_proj.bias", -model.action_decoder.bias


def _gemma(mixture: Mixture, to: str) -> Iterator[tuple[str, Tensor]]:
    for i, block in enumerate(mixture.blocks):
        layer = f"{to}layers.{i}."
        yield f"{layer}input_layernorm.weight", _scale(block.attention_norm)
        k, v = block.kv_proj.weight.chunk(2)
        yield f"{layer}self_attn.k_proj.weight", k
        yield f"{layer}self_attn.v_proj.weight", v
        if block.kv_only:
            continue
        gate, up = block.gate_up_proj.weight.chunk(2)
        yield f"{layer}self_attn.q_proj.weight", block.q_proj.weight
        yield f"{layer}self_attn.o_proj.weight", block.o_proj.weight
        yield f"{layer}post_attention_layernorm.weight", _scale(block.mlp_norm)
        yield f"{layer}mlp.gate_proj.weight", gate
        yield f"{layer}mlp.up_proj.weight", up
        yield f"{layer}mlp.down_proj.weight", block.down_proj.weight
    if mixture.final_norm is not None:
        yield f"{to}norm.weight", _scale(mixture.final_norm)


def _siglip(tower: SigLIP, to: str) -> Iterator[tuple[str, Tensor]]:
    yield from _linear(tower.patch_embedding, f"{to}embeddings.patch_embedding.")
    yield f"{to}embeddings.position_embedding.weight", tower.position_embedding
    for i, block in enumerate(tower.blocks):
        layer = f"{to}encoder.layers.{i}."
        weights, biases = block.qkv_proj.weight.chunk(3), block.qkv_proj.bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            yield f"{layer}self_attn.{name}_proj.weight", weight
            yield f"{layer}self_attn.{name}_proj.bias", bias
        yield from _linear(block.attention_norm, f"{layer}layer_norm1.")
        yield from _linear(block.o_proj, f"{layer}self_attn.out_proj.")
        yield from _linear(block.mlp_norm, f"{layer}layer_norm2.")
        yield from _linear(block.up_proj, f"{layer}mlp.fc1.")
        yield from _linear(block.down_proj, f"{layer}mlp.fc2.")
    yield from _linear(tower.final_norm, f"{to}post_layernorm.")


def _scale(norm: nn.Module) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return norm.weight


def _linear(module: Any, to: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{to}weight", module.weight
    yield f"{to}bias", module.bias


def _transformers_config(model: PiZero) -> Any:
    from transformers import PI0Config

    assert model.state_dim is not None
    tower = siglip(model)
    block = tower.blocks[0]
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": tower.width,
        "intermediate_size": block.up_proj.out_features,
        "num_hidden_layers": len(tower.blocks),
        "num_attention_heads": block.num_heads,
        "patch_size": tower.patch_embedding.kernel_size[0],
        "image_size": tower.image_size[0],
        "vision_use_head": False,
    }
    vlm = {
        "model_type": "paligemma",
        "text_config": _gemma_config(model.joint.mixtures[model.vlm], model),
        "vision_config": vision,
        "projection_dim": model.projector.out_features,
        "image_token_id": model.embedding.num_embeddings,
    }
    return PI0Config(
        vlm_config=vlm,
        dit_config=_gemma_config(model.joint.mixtures[model.action], model),
        chunk_size=model.horizon,
        max_state_dim=model.state_dim,
        max_action_dim=model.action_dim,
    )


def _gemma_config(mixture: Mixture, model: PiZero) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "hidden_size": mixture.width,
        "intermediate_size": mixture.blocks[0].down_proj.in_features,
        "num_hidden_layers": mixture.depth,
        "num_attention_heads": mixture.num_heads,
        "num_key_value_heads": mixture.num_kv_heads,
        "head_dim": mixture.head_dim,
        "vocab_size": model.embedding.num_embeddings,
    }


def _tensors(observation: Observation) -> list[Tensor]:
    values = (getattr(observation, f.name) for f in fields(observation))
    return [v for v in values if isinstance(v, torch.Tensor)]


def _clone(observation: Observation) -> Observation:
    values = {f.name: getattr(observation, f.name) for f in fields(observation)}
    tensors = {k: v.clone() for k, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(observation, **tensors)
