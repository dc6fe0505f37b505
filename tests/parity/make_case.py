"""Parity cases of any size, made here: random weights in a source's own layout, and the numbers
that a model of ours with explicitly given sizes gets from them.

Gradients are taken with respect to the stored tensors themselves, through the reading of each link,
so they do not share the way back that the tool uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.func import functional_call

from pizero.agent.config import build
from pizero.agent.weights import MemorySource, inspect
from pizero.model import PiZero, PiZeroFast
from pizero.types import Observation

Shapes = dict[str, tuple[int, ...]]
ROWS = [
    {"match": "out.prefix_mask", "exact": True},
    {"match": "grad.*", "relative_norm": 1e-5},
    {"match": "out.*", "atol": 2e-6, "rtol": 1e-6},
]


def expert(width: int, mlp_dim: int, **more: Any) -> dict[str, Any]:
    sizes = dict(depth=3, num_heads=4, num_kv_heads=2, head_dim=6)
    return dict(width=width, mlp_dim=mlp_dim) | sizes | more


DIMS = {
    "vlm": expert(20, 28),
    "action_expert": expert(14, 22),
    "vision": dict(
        width=12, depth=2, mlp_dim=18, num_heads=3, patch_size=7, image_size=21, tokens_per_image=9
    ),
    "vocab_size": 40,
    "action_dim": 5,
    "action_horizon": 3,
}


def gemma(sizes: Mapping[str, int], root: str, *, adaptive: bool = False, norm: bool = True):
    """Names and shapes of a Gemma stack of transformers."""
    w, m, d = sizes["width"], sizes["mlp_dim"], sizes["head_dim"]
    q, kv = sizes["num_heads"] * d, sizes["num_kv_heads"] * d
    scale = {"dense.weight": (3 * w, w), "dense.bias": (3 * w,)} if adaptive else {"weight": (w,)}
    shapes: Shapes = {f"{root}norm.{k}": s for k, s in scale.items()} if norm else {}
    for i in range(sizes["depth"]):
        layer = f"{root}layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}{name}.{k}": s for k, s in scale.items()}
        for name, shape in {
            "self_attn.q_proj": (q, w), "self_attn.k_proj": (kv, w), "self_attn.v_proj": (kv, w),
            "self_attn.o_proj": (w, q), "mlp.gate_proj": (m, w), "mlp.up_proj": (m, w),
            "mlp.down_proj": (w, m),
        }.items():  # fmt: skip
            shapes[f"{layer}{name}.weight"] = shape
    return shapes


def siglip(sizes: Mapping[str, int], root: str) -> Shapes:
    w, m, p = sizes["width"], sizes["mlp_dim"], sizes["patch_size"]
    shapes = linear(f"{root}post_layernorm", w)
    shapes[f"{root}embeddings.patch_embedding.weight"] = (w, 3, p, p)
    shapes[f"{root}embeddings.patch_embedding.bias"] = (w,)
    shapes[f"{root}embeddings.position_embedding.weight"] = (sizes["tokens_per_image"], w)
    for i in range(sizes["depth"]):
        layer = f"{root}encoder.layers.{i}."
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= linear(f"{layer}{name}", w)
        for x in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}self_attn.{x}", w, w)
        shapes |= linear(f"{layer}mlp.fc1", m, w) | linear(f"{layer}mlp.fc2", w, m)
    return shapes


def linear(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def openpi(dims: Mapping[str, Any], *, pi05: bool) -> Shapes:
    """openpi's PyTorch state dict, the token embedding under the name of the word head."""
    vlm, action, eyes = dims["vlm"], dims["action_expert"], dims["vision"]
    w, a = action["width"], dims["action_dim"]
    root = "paligemma_with_expert.paligemma."
    shapes = siglip(eyes, f"{root}model.vision_tower.vision_model.")
    shapes |= linear(f"{root}model.multi_modal_projector.linear", vlm["width"], eyes["width"])
    shapes |= gemma(vlm, f"{root}model.language_model.")
    shapes |= gemma(action, "paligemma_with_expert.gemma_expert.model.", adaptive=pi05)
    shapes[f"{root}lm_head.weight"] = (dims["vocab_size"], vlm["width"])
    shapes["paligemma_with_expert.gemma_expert.lm_head.weight"] = (dims["vocab_size"], w)
    shapes |= linear("action_in_proj", w, a) | linear("action_out_proj", a, w)
    if pi05:
        return shapes | linear("time_mlp_in", w, w) | linear("time_mlp_out", w, w)
    shapes |= linear("state_proj", w, a) | linear("action_time_mlp_in", w, 2 * w)
    return shapes | linear("action_time_mlp_out", w, w)


def open_pi_zero(dims: Mapping[str, Any]) -> Shapes:
    """open-pi-zero's state dict; `proprio` repeats `action` and is added when the case is made."""
    vlm, action, eyes = dims["vlm"], dims["action_expert"], dims["vision"]
    w, a = action["width"], dims["action_dim"]
    shapes = siglip(eyes, "vision_tower.vision_model.")
    shapes |= linear("multi_modal_projector.linear", vlm["width"], eyes["width"])
    shapes["embed_tokens.weight"] = (dims["vocab_size"], vlm["width"])
    shapes |= gemma(vlm, "joint_model.mixtures.vlm.", norm=False)
    shapes |= gemma(action, "joint_model.mixtures.action.")
    shapes |= linear("proprio_encoder", w, dims["proprio_dim"])
    shapes |= linear("action_encoder.linear_1", w, a)
    shapes |= linear("action_encoder.linear_2", w, 2 * w) | linear("action_encoder.linear_3", w, w)
    return shapes | linear("action_decoder", a, w)


def jax_tree(dims: Mapping[str, Any], *, pi05: bool = False) -> Shapes:
    """openpi's JAX tree: a PaliGemma, as pi0-FAST's is, or a flow policy where dims has an
    `action_expert`."""
    v, vlm, action = dims["vision"], dims["vlm"], dims.get("action_expert")
    e, L, H, f, p = (v[k] for k in ("width", "depth", "num_heads", "mlp_dim", "patch_size"))
    img, llm = "PaliGemma/img/", "PaliGemma/llm/"
    block = f"{img}Transformer/encoderblock/"
    attention = f"{block}MultiHeadDotProductAttention_0/"
    shapes: Shapes = {
        f"{img}embedding/kernel": (p, p, 3, e), f"{img}embedding/bias": (e,),
        f"{img}pos_embedding": (1, v["tokens_per_image"], e),
        **dense(f"{img}head", e, vlm["width"]),
        f"{attention}out/kernel": (L, H, e // H, e), f"{attention}out/bias": (L, e),
        **dense(f"{block}MlpBlock_0/Dense_0", e, f, stack=(L,)),
        **dense(f"{block}MlpBlock_0/Dense_1", f, e, stack=(L,)),
        f"{llm}embedder/input_embedding": (dims["vocab_size"], vlm["width"]),
        **stacked_gemma(vlm, llm, ""),
    }  # fmt: skip
    for x in ("query", "key", "value"):
        shapes |= {f"{attention}{x}/kernel": (L, e, H, e // H)}
        shapes |= {f"{attention}{x}/bias": (L, H, e // H)}
    norms = [f"{img}Transformer/encoder_norm"], [f"{block}LayerNorm_{i}" for i in (0, 1)]
    for names, shape in zip(norms, ((e,), (L, e)), strict=True):
        shapes |= {f"{name}/{kind}": shape for name in names for kind in ("scale", "bias")}
    if action is None:
        return shapes
    w, a = action["width"], dims["action_dim"]
    shapes |= stacked_gemma(action, llm, "_1", adaptive=pi05)
    shapes |= dense("action_in_proj", a, w) | dense("action_out_proj", w, a)
    if pi05:
        return shapes | dense("time_mlp_in", w, w) | dense("time_mlp_out", w, w)
    shapes |= dense("state_proj", a, w) | dense("action_time_mlp_in", 2 * w, w)
    return shapes | dense("action_time_mlp_out", w, w)


def stacked_gemma(sizes: Mapping[str, int], llm: str, end: str, *, adaptive: bool = False):
    """A Gemma of JAX; as many key heads as query heads make one projection of the three."""
    w, n, h, d, m = (sizes[k] for k in ("width", "depth", "num_heads", "head_dim", "mlp_dim"))
    attn, mlp, keys = f"{llm}layers/attn/", f"{llm}layers/mlp{end}/", sizes["num_kv_heads"]
    shapes: Shapes = {f"{attn}attn_vec_einsum{end}/w": (n, h, d, w)}
    if keys == h:
        shapes[f"{attn}qkv_einsum{end}/w"] = (n, 3, h, w, d)
    else:
        shapes[f"{attn}q_einsum{end}/w"] = (n, h, w, d)
        shapes[f"{attn}kv_einsum{end}/w"] = (n, 2, keys, w, d)
    shapes |= {f"{mlp}gating_einsum": (n, 2, w, m), f"{mlp}linear": (n, m, w)}
    norms = {f"{llm}layers/pre_{x}_norm{end}": (n,) for x in ("attention", "ffw")}
    for norm, stack in (norms | {f"{llm}final_norm{end}": ()}).items():
        scale = {f"{norm}/scale": (*stack, w)}
        shapes |= dense(f"{norm}/Dense_0", w, 3 * w, stack=stack) if adaptive else scale
    return shapes


def dense(name: str, inputs: int, outputs: int, *, stack: tuple[int, ...] = ()) -> Shapes:
    return {f"{name}/kernel": (*stack, inputs, outputs), f"{name}/bias": (*stack, outputs)}


def with_lora(shapes: Shapes, rank: int) -> Shapes:
    """The same with openpi's adapters on attention and feed-forward of every expert."""
    adapted = dict(shapes)
    for name, shape in shapes.items():
        if "einsum" in name or name.endswith("/linear"):
            stem = name.removesuffix("w") if "/attn/" in name else f"{name}_"
            adapted[f"{stem}lora_a"] = (*shape[:-1], rank)
            adapted[f"{stem}lora_b"] = (*shape[:-2], rank, shape[-1])
    return adapted


def merged(
    weights: Mapping[str, torch.Tensor], scales: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """Weights with their adapters, in openpi's own sums; `scales` by the end of names."""
    whole = {name: w for name, w in weights.items() if "lora" not in name}
    for name, a in weights.items():
        if not name.endswith("lora_a"):
            continue
        b, stem = weights[f"{name[:-1]}b"], name.removesuffix("lora_a")
        if not stem.endswith("/"):
            whole[stem[:-1]] = whole[stem[:-1]] + a @ b
            continue
        # every head's A meets the B of all heads in the output projection
        rule = "znhr,zmrd->znhd" if "attn_vec" in stem else "...ir,...ro->...io"
        end = "_1" if stem.endswith("_1/") else ""
        whole[f"{stem}w"] = whole[f"{stem}w"] + scales[end] * torch.einsum(rule, a, b)
    return whole


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values of the size that trained weights have, norms' too."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        std = max(shape[-2], 1) ** -0.5 if len(shape) > 1 else 0.3
        std = 0.2 if "lora_" in name else std
        weights[name] = torch.randn(shape, generator=generator) * std
    return weights


@dataclass
class Made:
    """A case about to be written; `extra` goes into case.json."""

    family: str
    dims: dict[str, Any]
    weights: dict[str, torch.Tensor]
    overrides: dict[str, Any]
    io: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)  # of adapters, by the end of names

    def __post_init__(self) -> None:
        kind = "pi0_fast" if self.family == "pi0_fast" else None
        self.found = inspect(MemorySource(self.weights), overrides=self.overrides, kind=kind)

    def model(self, weights: Mapping[str, torch.Tensor] | None = None) -> PiZero | PiZeroFast:
        """Ours, of these sizes, with these weights."""
        model = build(self.found.model)
        model.load_state_dict(self.canonical(weights or self.weights, model), strict=True)
        return model.eval()

    def canonical(self, weights: Mapping[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
        """Our tensors from the stored ones; gradients flow through."""
        weights, ours = merged(weights, self.scales) if self.scales else weights, {}
        for name, links in self.found.links.by_ours.items():
            pieces = {x.rows[0] if x.rows else 0: x.read(weights[x.theirs]) for x in links
                      if x.theirs in weights}  # fmt: skip
            if name in model.state_dict():
                ours[name] = torch.cat([pieces[i] for i in sorted(pieces)])
        return ours

    def take_gradients(self, loss_of) -> None:
        """`loss_of(call)` gets a function that calls the model with weights that have gradients."""
        leaves = {n: w.clone().requires_grad_() for n, w in self.weights.items()}
        for _, twin in self.found.twins:
            leaves.pop(twin)
        model = self.model()
        named = self.canonical(leaves, model)
        loss = loss_of(lambda *args: functional_call(model, named, args))
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        self.gradients = {
            name: torch.zeros_like(w) if g is None else g
            for (name, w), g in zip(leaves.items(), grads, strict=True)
        }
        for name, twin in self.found.twins:
            self.gradients[twin] = self.gradients[name]

    def write(self, folder: Path, *, weights: str | None = "weights.safetensors") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"family": self.family, "dims": self.dims, "tolerance_rows": ROWS, **self.extra}
        (folder / "case.json").write_text(json.dumps(facts))
        save_file({n: x.detach().clone().contiguous() for n, x in self.io.items()},
                  folder / "io.safetensors")  # fmt: skip
        if weights:
            save_file(self.weights, folder / weights)
        if self.gradients:
            grads = {f"grad.{n}": g.contiguous().clone() for n, g in self.gradients.items()}
            save_file(grads, folder / "gradients.safetensors")
        return folder


def flow_case(family: str = "pi0", *, dims: Mapping[str, Any] | None = None,
              weights: Mapping[str, torch.Tensor] | None = None, seed: int = 0,
              cameras: tuple[str, ...] = ("front", "wrist"), masks: bool = True,
              gradients: bool = False, steps: tuple[int, ...] = (3,),
              dtype: torch.dtype = torch.float32, jax: bool = False,
              lora: Mapping[str, float] | None = None) -> Made:  # fmt: skip
    """A flow policy's case. open-pi-zero has one camera, and picture tokens among its ids. `jax`
    and with `lora`, by the end of an expert's names, adapters and what they are scaled by."""
    dims = {**DIMS, **(dims or {})}
    zero, pi05 = family == "open_pi_zero", family == "pi05"
    shapes = open_pi_zero(dims) if zero else openpi(dims, pi05=pi05)
    if jax:
        shapes = jax_tree(dims, pi05=pi05)
    if lora:
        shapes = with_lora(shapes, rank=2)
        for key, end in (("vlm", ""), ("action_expert", "_1")):
            dims[key] = {**dims[key], "lora": {"rank": 2, "alpha": 2 * lora[end]}}
    stored = dict(weights or random_weights(shapes, seed))
    if zero:
        for name in [n for n in stored if n.startswith("joint_model.mixtures.action.")]:
            stored[name.replace(".action.", ".proprio.")] = stored[name].clone()
    overrides = {
        "vision.num_heads": dims["vision"]["num_heads"],
        "horizon": dims["action_horizon"],
        **{
            f"joint.mixtures.{ours}.{key}": value
            for ours, theirs in (("vlm", "vlm"), ("action", "action_expert"))
            for key, value in (
                ("num_heads", dims[theirs]["num_heads"]),
                ("rope_base", float(dims[theirs].get("rope_theta", 10_000.0))),
            )
        },
    }
    if zero:
        overrides |= {
            "joint.softcap": dims["attention_softcap"],
            "action_clip": dims["final_action_clip_value"],
            "flow.sig_min": dims["flow_sig_min"],
            "time_embedding.max_period": 2 * torch.pi * dims["time_max_period"],
        }
    made = Made(family, dims, stored, overrides, scales=lora or {})
    model = made.model()
    if dtype != torch.float32:
        made.extra["dtype"] = str(dtype).removeprefix("torch.")
        model.cast(dtype)
    io, observation = _inputs(dims, zero, cameras, masks, seed, model.state_dim is not None)
    made.io = dict(io)
    time = io["in.time"].double() if zero else 1 - io["in.time"].double()

    def run(call):
        return call(observation, io["in.actions"], io["in.noise"][:, None], time[:, None])[:, 0]

    if gradients:
        made.take_gradients(lambda call: run(call).mean())
    with torch.no_grad():
        made.io |= _outputs(model, observation, io, time, zero, steps, run(model))
    return made


def _inputs(dims, zero, cameras, masks, seed, has_state):
    generator = torch.Generator().manual_seed(seed + 1)
    b, h, a, size = 3, dims["action_horizon"], dims["action_dim"], dims["vision"]["image_size"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    pictures = torch.rand(b, len(cameras), 3, size, size, generator=generator) * 2 - 1
    words = torch.randint(3, 30, (b, 6), generator=generator)
    lengths = torch.tensor([6, 3, 5])
    token_mask = torch.arange(6)[None] < lengths[:, None]
    words = words * token_mask
    io = {"in.actions": normal(b, h, a), "in.noise": normal(b, h, a),
          "in.time": torch.rand(b, generator=generator)}  # fmt: skip
    image_mask = None
    if zero:
        n = dims["vision"]["tokens_per_image"]
        ids = torch.full((b, n), dims["image_token_index"])
        io["in.image"] = pictures[:, 0]
        io["in.input_ids"] = torch.cat((ids, words), dim=1)
        io["in.attention_mask"] = torch.cat((torch.ones(b, n, dtype=torch.bool), token_mask), dim=1)
        io["in.proprio"] = state = normal(b, dims["cond_steps"], dims["proprio_dim"])
    else:
        io |= {f"in.image.{c}": pictures[:, i] for i, c in enumerate(cameras)}
        io["in.tokens"] = words
        io["in.state"] = normal(b, a)
        state = io["in.state"][:, None] if has_state else None
        if masks:
            image_mask = torch.ones(b, len(cameras), dtype=torch.bool)
            image_mask[1, -1] = False
            io |= {f"in.image_mask.{c}": image_mask[:, i] for i, c in enumerate(cameras)}
            io["in.token_mask"] = token_mask
        else:
            token_mask = None
    return io, Observation(
        images=pictures, tokens=words, image_mask=image_mask, token_mask=token_mask, state=state
    )


def _outputs(model, observation, io, time, zero, steps, loss):
    noise = io["in.noise"]
    point = model.flow.point(noise, io["in.actions"], time)
    kept = model.prefix(observation)
    velocity = model.velocity(kept, point, time)
    tokens, valid, _ = model.embed_prefix(observation)
    embedded = torch.cat((tokens["image"], tokens["text"]), dim=1)
    n = embedded.shape[1]
    real = torch.ones(len(noise), n, dtype=torch.bool) if valid is None else valid[:, :n]
    width = model.joint.mixtures["action"].width
    embedding = model.time_embedding(time, width)
    actions = model.action_encoder(point, model.action_encoder.token_term(embedding))
    out = {"loss": loss, "loss_mean": loss.mean()[None], "x_t": point, "prefix_mask": real,
           "velocity": velocity if zero else -velocity, "time_embedding": embedding}  # fmt: skip
    for k in steps:
        path = torch.stack(model.trajectory(observation, noise, k))
        out[f"actions.steps{k}"] = model.sample(observation, noise, k)
        out[f"actions_unclipped.steps{k}"] = path[-1]
        out[f"trajectory.steps{k}"] = path
    stream = "vlm." if zero else ""
    for i in range(len(kept.keys)):
        out[f"cache_k.{stream}{i}"] = kept.keys[i][:, :n].transpose(1, 2)
        out[f"cache_v.{stream}{i}"] = kept.values[i][:, :n].transpose(1, 2)
    if zero:
        scale = embedded.shape[-1] ** 0.5
        out["prefix_embs"] = torch.where(real[..., None], embedded / scale, 0)
        out["proprio_embs"] = tokens["state"] / width**0.5
        out["action_embs"] = actions
        out["vision_features"] = model.vision(observation.images[:, 0])
        out["cache_k.proprio.1"] = kept.keys[1][:, n:].transpose(1, 2)
    else:
        out["prefix_embs"] = embedded
        state = [tokens["state"]] if model.state_dim is not None else []
        out["suffix_embs"] = torch.cat((*state, actions), dim=1)
        if model.state_dim is None:
            out["adarms_cond"] = model.action_encoder.condition(embedding)
    return {f"out.{name}": x.float() if x.is_floating_point() else x for name, x in out.items()}


ZERO = dict(
    image_token_index=39, pad_token_id=0, cond_steps=2, proprio_dim=4, time_max_period=100.0,
    attention_softcap=3.0, flow_sig_min=0.02, final_action_clip_value=0.4,
    vlm=expert(20, 28, rope_theta=500.0), action_expert=expert(14, 22, rope_theta=100.0),
)  # fmt: skip


def fast_case(seed: int = 0, *, gradients: bool = True, vlm: Mapping[str, Any] | None = None,
              lora: float | None = None) -> Made:  # fmt: skip
    """A pi0-FAST case in JAX's layout, with greedy tokens."""
    dims = {k: v for k, v in DIMS.items() if k != "action_expert"} | {"vlm": vlm or DIMS["vlm"]}
    overrides = {"horizon": 3, "joint.mixtures.vlm.rope_base": 10_000.0}
    shapes = jax_tree(dims) if lora is None else with_lora(jax_tree(dims), rank=3)
    made = Made(
        *("pi0_fast", dims, random_weights(shapes, seed), overrides),
        scales={} if lora is None else {"": lora},
    )
    model = made.model()
    generator = torch.Generator().manual_seed(seed)
    size = dims["vision"]["image_size"]
    pictures = torch.rand(2, 2, 3, size, size, generator=generator) * 2 - 1
    tokens = torch.randint(3, 40, (2, 8), generator=generator)
    mask = torch.arange(8)[None] < torch.tensor([[8], [6]])
    answer = torch.arange(8)[None] >= torch.tensor([[4], [3]])
    io = {"in.image.a": pictures[:, 0], "in.image.b": pictures[:, 1], "in.tokens": tokens * mask,
          "in.token_mask": mask, "in.token_ar_mask": (answer & mask).long(),
          "in.token_loss_mask": answer & mask, "in.decode.tokens": tokens * mask * ~answer,
          "in.decode.token_mask": mask & ~answer}  # fmt: skip
    observation = Observation(
        images=pictures, tokens=tokens * mask, token_mask=mask, token_causal=answer & mask,
        token_loss=answer & mask,
    )  # fmt: skip
    prompt = Observation(images=pictures, tokens=tokens * mask * ~answer, token_mask=mask & ~answer)
    made.io = dict(io)
    if gradients:
        made.take_gradients(lambda call: call(observation).mean())
    with torch.no_grad():
        loss = model(observation)
        made.io |= {"out.loss": loss, "out.loss_mean": loss.mean()[None],
                    "out.logits": model.predictions(observation)}  # fmt: skip
        alone = Observation(**{
            f: None if (x := getattr(prompt, f)) is None else x[1:2]
            for f in ("images", "tokens", "token_mask")
        })  # fmt: skip
        for name, who in (("decode", prompt), ("decode_row1", alone)):
            given = model.decode(who, max_new_tokens=5, keep_logits=True)
            made.io |= {f"out.{name}.tokens": given.tokens, f"out.{name}.logits": given.logits}
    made.extra["tolerance_rows"] = [
        {"match": "grad.*", "relative_norm": 1e-5},
        {"match": "out.*.tokens", "exact": True},
        {"match": "out.*", "atol": 2e-5, "rtol": 1e-5},
    ]
    return made
