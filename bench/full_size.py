"""Random checkpoints of any size in the formats that are published, for measuring how they load.

    python -m bench.full_size openpi /tmp/pi0               7.0 GB
    python -m bench.full_size orbax /tmp/jax --dtype fp32   13 GB

Names and shapes are tables, written down from the published checkpoints and not derived from what
loads them. Numbers are one random block over and over, each tensor starting elsewhere in it, so
that a file is made about as fast as the disk takes it and with the memory of one tensor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pizero.agent.weights.entry import Entry
from pizero.agent.weights.write import write_safetensors
from pizero.types import Tensor

FORMATS = ("openpi", "lerobot", "giga", "transformers", "open_pi_zero", "orbax")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BLOCK = 1 << 22

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transformer:
    width: int
    depth: int
    mlp: int
    heads: int = 8
    head_dim: int = 256


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a model; those of pi0 and pi0.5 unless told otherwise."""

    vlm: Transformer = Transformer(2048, 18, 16384)
    expert: Transformer = Transformer(1024, 18, 4096)
    vision: Transformer = Transformer(1152, 27, 4304, heads=16, head_dim=72)
    patch: int = 14
    patches: int = 256
    vocabulary: int = 257152
    state: int = 32
    action: int = 32


PUBLISHED = Sizes()
# open-pi-zero's: PaliGemma's vocabulary with its place-holders, and a robot of 7 dimensions
BRIDGE = Sizes(vocabulary=257216, state=7, action=7)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.full_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("pi0", "pi05"), default="pi0")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args(arguments)
    path = write_checkpoint(
        options.format, options.folder, kind=options.kind, dtype=DTYPES[options.dtype]
    )
    print(f"wrote {path}: {disk_size(path) / 1e9:.2f} GB")
    return 0


def write_checkpoint(
    format: str,
    folder: Path,
    *,
    kind: str = "pi0",
    dtype: torch.dtype = torch.bfloat16,
    sizes: Sizes | None = None,
) -> Path:
    """Make a checkpoint in `folder`, which is created; returns what to load."""
    sizes = sizes or (BRIDGE if format == "open_pi_zero" else PUBLISHED)
    names = TABLES[format](sizes, kind)
    entries = {name: Entry(shape, dtype) for name, shape in names.items()}
    folder.mkdir(parents=True)
    if format == "orbax":
        return _write_orbax(folder / "params", entries)
    if format == "open_pi_zero":
        return _write_torch(folder / "bridge_beta_step19296.pt", entries)
    if format in ("giga", "transformers"):
        return _write_shards(folder, entries, torch_files=format == "giga")
    write_safetensors(folder / "model.safetensors", entries, Numbers(entries).read)
    if format == "lerobot":
        config = {"type": kind, "chunk_size": 50, "max_state_dim": sizes.state}
        (folder / "config.json").write_text(json.dumps(config | {"max_action_dim": sizes.action}))
    return folder


def disk_size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")))


class Numbers:
    """Small random numbers for every tensor of a table, the same ones each time."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(_BLOCK, generator=generator) * 0.02
        self._blocks = {e.dtype: block.to(e.dtype) for e in entries.values()}
        self._starts = {name: 977 * i % _BLOCK for i, name in enumerate(entries)}

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        block = self._blocks[entry.dtype].roll(-self._starts[name])
        flat = torch.empty(entry.num_elements, dtype=entry.dtype)
        for part in flat.split(_BLOCK):
            part.copy_(block[: len(part)])
        return flat.reshape(entry.shape)


def openpi(sizes: Sizes, kind: str) -> dict[str, Shape]:
    """openpi's PyTorch module: the embedding is stored as `lm_head` only."""
    root, expert = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."
    width, adaptive = sizes.expert.width, kind == "pi05"
    return {
        f"{root}lm_head.weight": (sizes.vocabulary, sizes.vlm.width),
        f"{expert}lm_head.weight": (sizes.vocabulary, width),
        **_vision(f"{root}model.vision_tower.vision_model.", sizes),
        **_linear(f"{root}model.multi_modal_projector.linear", sizes.vision.width, sizes.vlm.width),
        **_gemma(f"{root}model.language_model.", sizes.vlm),
        **_gemma(f"{expert}model.", sizes.expert, adaptive=adaptive),
        **_heads(sizes, kind),
    }


def lerobot(sizes: Sizes, kind: str) -> dict[str, Shape]:
    """As LeRobot saves what it loaded: openpi's names in `model.`, the embedding twice."""
    names = openpi(sizes, kind)
    embedding = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    names[embedding] = (sizes.vocabulary, sizes.vlm.width)
    return {f"model.{name}": shape for name, shape in names.items()}


def giga(sizes: Sizes, kind: str) -> dict[str, Shape]:
    """giga-models' module, whose layers hold both experts: 0 the language model, 1 the actions."""
    root = "paligemma_with_expert."
    names: dict[str, Shape] = {f"{root}embed_tokens.weight": (sizes.vocabulary, sizes.vlm.width)}
    names |= _vision(f"{root}vision_tower.", sizes)
    names |= _linear(f"{root}multi_modal_projector.linear", sizes.vision.width, sizes.vlm.width)
    for i, expert in enumerate((sizes.vlm, sizes.expert)):
        adaptive = i == 1 and kind == "pi05"
        for name, shape in _gemma(root, expert, adaptive=adaptive).items():
            name = name.replace(f"{root}norm.", f"{root}norms.{i}.")
            name = name.replace(".mlp.", f".mlps.{i}.").replace("_layernorm.", f"_layernorms.{i}.")
            names[name.replace("_proj.w", f"_proj.{i}.w" if "attn" in name else "_proj.w")] = shape
    return names | _heads(sizes, kind)


def transformers(sizes: Sizes, kind: str) -> dict[str, Shape]:
    """PI0ForConditionalGeneration as it saves itself."""
    if kind != "pi0":
        raise ValueError(f"transformers has pi0 only, not {kind}")
    root, words = "paligemma_with_expert.paligemma.model.", "language_model.model."
    return {
        f"{root}{words}embed_tokens.weight": (sizes.vocabulary, sizes.vlm.width),
        "paligemma_with_expert.gemma_expert.lm_head.weight": (
            sizes.vocabulary, sizes.expert.width,
        ),
        **_vision(f"{root}vision_tower.", sizes),
        **_linear(f"{root}multi_modal_projector.linear", sizes.vision.width, sizes.vlm.width),
        **_gemma(f"{root}{words}", sizes.vlm),
        **_gemma("paligemma_with_expert.gemma_expert.model.", sizes.expert),
        **_heads(sizes, kind),
    }  # fmt: skip


def open_pi_zero(sizes: Sizes, kind: str) -> dict[str, Shape]:
    """open-pi-zero's released files; `proprio` and `action` are one module, listed twice."""
    if kind != "pi0":
        raise ValueError(f"open-pi-zero published pi0 only, not {kind}")
    width, mixtures = sizes.expert.width, "joint_model.mixtures."
    return {
        "embed_tokens.weight": (sizes.vocabulary, sizes.vlm.width),
        **_vision("vision_tower.vision_model.", sizes),
        **_linear("multi_modal_projector.linear", sizes.vision.width, sizes.vlm.width),
        **_gemma(f"{mixtures}vlm.", sizes.vlm, final_norm=False),
        **_gemma(f"{mixtures}proprio.", sizes.expert),
        **_gemma(f"{mixtures}action.", sizes.expert),
        **_linear("action_encoder.linear_1", sizes.action, width),
        **_linear("action_encoder.linear_2", 2 * width, width),
        **_linear("action_encoder.linear_3", width, width),
        **_linear("proprio_encoder", sizes.state, width),
        **_linear("action_decoder", width, sizes.action),
    }


def orbax(sizes: Sizes, kind: str) -> dict[str, Shape]:
    """openpi's JAX tree: layers are stacked, kernels are [in, out]."""
    vision, width, adaptive = sizes.vision, sizes.expert.width, kind == "pi05"
    block, heads = "PaliGemma/img/Transformer/encoderblock/", (vision.heads, vision.head_dim)
    attention, layers = f"{block}MultiHeadDotProductAttention_0/", (vision.depth,)
    names: dict[str, Shape] = {
        "PaliGemma/img/embedding/kernel": (sizes.patch, sizes.patch, 3, vision.width),
        "PaliGemma/img/embedding/bias": (vision.width,),
        "PaliGemma/img/pos_embedding": (1, sizes.patches, vision.width),
        f"{block}MlpBlock_0/Dense_0/kernel": (*layers, vision.width, vision.mlp),
        f"{block}MlpBlock_0/Dense_0/bias": (*layers, vision.mlp),
        f"{block}MlpBlock_0/Dense_1/kernel": (*layers, vision.mlp, vision.width),
        f"{block}MlpBlock_0/Dense_1/bias": (*layers, vision.width),
        f"{attention}out/kernel": (*layers, *heads, vision.width),
        f"{attention}out/bias": (*layers, vision.width),
        "PaliGemma/img/Transformer/encoder_norm/scale": (vision.width,),
        "PaliGemma/img/Transformer/encoder_norm/bias": (vision.width,),
        **_dense("PaliGemma/img/head", vision.width, sizes.vlm.width),
        "PaliGemma/llm/embedder/input_embedding": (sizes.vocabulary, sizes.vlm.width),
        **_stacked_gemma(sizes.vlm, ""),
        **_stacked_gemma(sizes.expert, "_1", adaptive=adaptive),
        **_dense("action_in_proj", sizes.action, width),
        **_dense("action_out_proj", width, sizes.action),
        **({} if adaptive else _dense("state_proj", sizes.state, width)),
        **_dense(f"{_time(kind)}_in", width if adaptive else 2 * width, width),
        **_dense(f"{_time(kind)}_out", width, width),
    }
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        names |= {f"{block}{norm}/{part}": (*layers, vision.width) for part in ("scale", "bias")}
    for part in ("query", "key", "value"):
        names[f"{attention}{part}/kernel"] = (*layers, vision.width, *heads)
        names[f"{attention}{part}/bias"] = (*layers, *heads)
    return names


TABLES = {
    "openpi": openpi,
    "lerobot": lerobot,
    "giga": giga,
    "transformers": transformers,
    "open_pi_zero": open_pi_zero,
    "orbax": orbax,
}


def _time(kind: str) -> str:
    return "time_mlp" if kind == "pi05" else "action_time_mlp"


def _heads(sizes: Sizes, kind: str) -> dict[str, Shape]:
    """State, action and time layers of the PyTorch forms."""
    width, adaptive = sizes.expert.width, kind == "pi05"
    return {
        **_linear("action_in_proj", sizes.action, width),
        **_linear("action_out_proj", width, sizes.action),
        **({} if adaptive else _linear("state_proj", sizes.state, width)),
        **_linear(f"{_time(kind)}_in", width if adaptive else 2 * width, width),
        **_linear(f"{_time(kind)}_out", width, width),
    }


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _dense(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}


def _vision(root: str, sizes: Sizes) -> dict[str, Shape]:
    width, mlp = sizes.vision.width, sizes.vision.mlp
    names: dict[str, Shape] = {
        f"{root}embeddings.patch_embedding.weight": (width, 3, sizes.patch, sizes.patch),
        f"{root}embeddings.patch_embedding.bias": (width,),
        f"{root}embeddings.position_embedding.weight": (sizes.patches, width),
        f"{root}post_layernorm.weight": (width,),
        f"{root}post_layernorm.bias": (width,),
    }
    for i in range(sizes.vision.depth):
        layer = f"{root}encoder.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names |= _linear(f"{layer}self_attn.{part}", width, width)
        for norm in ("layer_norm1", "layer_norm2"):
            names |= {f"{layer}{norm}.{part}": (width,) for part in ("weight", "bias")}
        names |= _linear(f"{layer}mlp.fc1", width, mlp) | _linear(f"{layer}mlp.fc2", mlp, width)
    return names


def _gemma(
    root: str, sizes: Transformer, *, adaptive: bool = False, final_norm: bool = True
) -> dict[str, Shape]:
    width, queries = sizes.width, sizes.heads * sizes.head_dim

    def norm(name: str) -> dict[str, Shape]:
        name = f"{root}{name}"
        return (
            _linear(f"{name}.dense", width, 3 * width) if adaptive else {f"{name}.weight": (width,)}
        )

    names = norm("norm") if final_norm else {}
    for i in range(sizes.depth):
        layer = f"{root}layers.{i}."
        names |= norm(f"layers.{i}.input_layernorm") | norm(f"layers.{i}.post_attention_layernorm")
        names |= {
            f"{layer}self_attn.q_proj.weight": (queries, width),
            f"{layer}self_attn.k_proj.weight": (sizes.head_dim, width),
            f"{layer}self_attn.v_proj.weight": (sizes.head_dim, width),
            f"{layer}self_attn.o_proj.weight": (width, queries),
            f"{layer}mlp.gate_proj.weight": (sizes.mlp, width),
            f"{layer}mlp.up_proj.weight": (sizes.mlp, width),
            f"{layer}mlp.down_proj.weight": (width, sizes.mlp),
        }
    return names


def _stacked_gemma(sizes: Transformer, suffix: str, *, adaptive: bool = False) -> dict[str, Shape]:
    root, layers, width = "PaliGemma/llm/", (sizes.depth,), sizes.width
    per_head = (sizes.heads, width, sizes.head_dim)
    names: dict[str, Shape] = {
        f"{root}layers/attn/q_einsum{suffix}/w": (*layers, *per_head),
        f"{root}layers/attn/kv_einsum{suffix}/w": (*layers, 2, 1, width, sizes.head_dim),
        f"{root}layers/attn/attn_vec_einsum{suffix}/w": (
            *layers, sizes.heads, sizes.head_dim, width,
        ),
        f"{root}layers/mlp{suffix}/gating_einsum": (*layers, 2, width, sizes.mlp),
        f"{root}layers/mlp{suffix}/linear": (*layers, sizes.mlp, width),
    }  # fmt: skip
    norms = {
        f"{root}layers/pre_attention_norm{suffix}": layers,
        f"{root}layers/pre_ffw_norm{suffix}": layers,
        f"{root}final_norm{suffix}": (),
    }
    for name, leading in norms.items():
        if adaptive:
            names[f"{name}/Dense_0/kernel"] = (*leading, width, 3 * width)
            names[f"{name}/Dense_0/bias"] = (*leading, 3 * width)
        else:
            names[f"{name}/scale"] = (*leading, width)
    return names


def _write_shards(folder: Path, entries: Mapping[str, Entry], *, torch_files: bool) -> Path:
    """A folder as transformers (safetensors) or diffusers (torch.save) splits it, with its index
    and a config.json."""
    total = sum(entry.num_bytes for entry in entries.values())
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        if sum(e.num_bytes for e in shards[-1].values()) > total / 3:
            shards.append({})
        shards[-1][name] = entry
    stem, end = ("diffusion_pytorch_model", "bin") if torch_files else ("model", "safetensors")
    where = {}
    for i, part in enumerate(shards, start=1):
        path = folder / f"{stem}-{i:05d}-of-{len(shards):05d}.{end}"
        if torch_files:
            _write_torch(path, part, alone=True)
        else:
            write_safetensors(path, part, Numbers(part).read)
        where |= dict.fromkeys(part, path.name)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"chunk_size": 50}))
    return folder


def _write_torch(path: Path, entries: Mapping[str, Entry], *, alone: bool = False) -> Path:
    """A file of torch.save, `alone` or with a training program's other keys, made without its
    tensors.

    torch writes it from tensors without memory, which leaves holes; the numbers then go there.
    """

    def key(name: str) -> str:
        return name.replace(".proprio.", ".action.")  # one storage for both names

    with FakeTensorMode():
        own = {name: torch.empty(e.shape, dtype=e.dtype) for name, e in entries.items()}
        content: dict[str, Any] = {name: own[key(name)] for name in entries}
        if not alone:
            content = {"cnt_update": 19296, "cnt_batch": 308736, "model": content}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, path)
        saved = torch.load(path, weights_only=True)
    saved = saved if alone else saved["model"]
    numbers = Numbers(entries)
    with path.open("r+b") as file:
        for name in {key(name): None for name in entries}:
            file.seek(saved[name].untyped_storage()._checkpoint_offset)
            file.write(_bits(numbers.read(name)).numpy().data)
    return path


def _write_orbax(folder: Path, entries: Mapping[str, Entry]) -> Path:
    """A folder as Orbax writes it from one process: OCDBT, each array one zstd chunk of zarr."""
    import tensorstore

    folder.mkdir()
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.absolute()}/"}}
    numbers, tree = Numbers(entries), {}
    for name, entry in entries.items():
        keys = ["params", *name.split("/")]
        array: Any = tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": database | {"path": ".".join(keys) + "/"},
                "metadata": {
                    "compressor": {"id": "zstd", "level": 1},
                    "chunks": list(entry.shape),
                },
                "store_data_equal_to_fill_value": True,
            },
            create=True,
            dtype=str(entry.dtype).removeprefix("torch."),
            shape=entry.shape,
        ).result()
        array.write(_bits(numbers.read(name)).numpy().view(array.dtype.numpy_dtype)).result()
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    content = {
        "tree_metadata": tree,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
    }
    (folder / "_METADATA").write_text(json.dumps(content))
    return folder


def _bits(tensor: Tensor) -> Tensor:
    """The same bytes in a dtype that numpy has."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


if __name__ == "__main__":
    raise SystemExit(main())
