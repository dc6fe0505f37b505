"""What a checkpoint is, from the names and shapes of its tensors.

The format and all sizes come from the tensors themselves, never from a path or a file name. What
leaves no trace in them is taken from the `config.json` beside them, else assumed and noted. The
semantics that names cannot tell are those of `config/compat/*.yaml`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pizero.agent.weights import jax_layout, torch_layout
from pizero.agent.weights.folder import UNREAD, WEIGHTS, own_folder, read_description
from pizero.agent.weights.links import LeftOut, Link, Links
from pizero.agent.weights.lora import SCALES, MergedLora
from pizero.agent.weights.nodes import language_node, override, pizero_node
from pizero.agent.weights.safetensors_file import SafetensorsSource
from pizero.agent.weights.source import Source, open_source
from pizero.agent.weights.spelling import spell_all

KINDS = ("pi0", "pi05", "pi0_fast", "paligemma")
OLD_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


@dataclass(frozen=True)
class Found:
    """A checkpoint understood.

    layout    "pizero", "openpi_torch" (LeRobot's, giga's and transformers' pi0 too), "openpi_jax",
              "open_pi_zero" or "paligemma"
    kind      one of KINDS
    model     the Hydra node of the model, with every argument
    links     between our tensors and the stored ones
    left_out  stored tensors that no policy reads
    twins     pairs of stored tensors that must hold the same numbers
    notes     what was assumed
    """

    source: Source
    layout: str
    kind: str
    model: dict[str, Any]
    links: Links
    left_out: tuple[LeftOut, ...]
    twins: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    def to_theirs(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors of ours (weights, gradients) under the stored names, in the stored layout."""
        shapes = {name: entry.shape for name, entry in self.source.entries.items()}
        return self.links.to_theirs(ours, shapes)


def inspect(
    path: str | Path | Source,
    *,
    overrides: Mapping[str, Any] | None = None,
    kind: str | None = None,
) -> Found:
    """Recognise a checkpoint. Raises ValueError where nothing known fits.

    `overrides` sets what cannot be found, by dotted key of the model node: {"horizon": 10,
    "vision.num_heads": 4}; "lora.vlm.scale" and "lora.action.scale" are alpha / rank of openpi's
    adapters. `kind` "pi0_fast" tells a PaliGemma that speaks actions from one that speaks words,
    which have the same tensors.
    """
    overrides = dict(overrides or {})
    if isinstance(path, str | Path) and (folder := own_folder(path)):
        return _own(folder, overrides)
    source = open_source(path) if isinstance(path, str | Path) else path
    scales = {x: overrides.pop(key) for x, key in SCALES.items() if key in overrides}
    if isinstance(source, MergedLora):
        source, scales = source.base, {**source.scales, **scales}
    merged, notes = MergedLora(source, scales), []
    if merged.adapted and not scales and any("/attn/" in name for name in merged.adapted):
        keys = ", ".join(map(repr, SCALES.values()))
        notes.append(f"LoRA's alpha / rank is not stored: 1 assumed, overrides of {keys} change it")
    if scales and not merged.adapted:
        notes.append("there are no adapters here whose scale could be set")
    if any(name.startswith("PaliGemma/") for name in source.entries):
        return _jax(merged, overrides, kind, notes)
    return _torch(merged, overrides, kind, notes)


def _own(folder: Path, overrides: dict[str, Any]) -> Found:
    config, _ = read_description(folder)
    node = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(node, dict)
    node = {str(key): value for key, value in node.items()}
    override(node, overrides)
    unread = folder / UNREAD
    source = SafetensorsSource(folder / WEIGHTS, *([unread] if unread.is_file() else []))
    links = Links(Link(name, name) for name in source.entries)
    named = {"PiZeroFast": "pi0_fast", "PaliGemma": "paligemma"}
    flow = "pi05" if node.get("state_dim") is None else "pi0"
    kind = named.get(str(node["_target_"]).rsplit(".", 1)[-1], flow)
    return Found(source, "pizero", kind, node, links, (), (), ())


def _torch(
    source: MergedLora, overrides: dict[str, Any], kind: str | None, notes: list[str]
) -> Found:
    stored = spell_all(n for n in source.entries if not n.startswith(OLD_STATISTICS))
    _refuse_adapters(source)
    entries = {name: source.entries[theirs] for name, theirs in stored.items()}
    if "embed.weight" not in entries and "head.weight" in entries:
        entries["embed.weight"] = entries["head.weight"]
        stored["embed.weight"] = stored.pop("head.weight")
    config = _config_beside(source.path)
    open_pi_zero = any(n.startswith("time_action_mlp_in.") for n in entries)
    flow = open_pi_zero or any(n.startswith("action_in_proj.") for n in entries)
    if not flow and not any(n.startswith("vlm.layers.") for n in entries):
        raise ValueError(_unknown(source))
    layout = "open_pi_zero" if open_pi_zero else "openpi_torch" if flow else "paligemma"
    try:
        eyes = torch_layout.vision_sizes(entries)
        heads = {x: overrides.get(f"joint.mixtures.{x}.num_heads") for x in ("vlm", "action")}
        heads = {x: config.get("num_heads") if h is None else h for x, h in heads.items()}
        vlm = torch_layout.mixture_sizes(entries, "vlm.", heads["vlm"])
        vocab_size = entries["embed.weight"].shape[0]
        if eyes["num_heads"] is None:
            eyes["num_heads"] = config.get("vision_heads")
        if flow:
            action = torch_layout.mixture_sizes(entries, "expert.", heads["action"])
            kind = "pi05" if action["cond_dim"] is not None else "pi0"
            state = entries.get("state_proj.weight") if kind == "pi0" else None
            _note_acting(config, notes)
            node = pizero_node(
                "open_pi_zero" if open_pi_zero else "openpi",
                *(eyes, vlm, action, vocab_size),
                horizon=_horizon(config, 4 if open_pi_zero else 50, overrides, notes),
                action_dim=entries["action_out_proj.weight"].shape[0],
                state_dim=None if state is None else state.shape[1],
            )
        else:
            kind = kind or ("pi0_fast" if config.get("type") == "pi0_fast" else "paligemma")
            node = language_node(kind, eyes, vlm, vocab_size)
            _note_chunk(kind, node, {**config, **overrides}, notes)
    except KeyError as error:
        missing = _as_stored(str(error.args[0]), stored)
        raise ValueError(_cannot_size(source, missing)) from error
    if flow:
        _refuse_conventions(source, config, node, overrides)
    elif "rope_theta" in config:
        node["joint"]["mixtures"]["vlm"]["rope_base"] = config["rope_theta"]
    if kind == "pi0_fast":
        node |= {key: config[key] for key in ("horizon", "action_dim") if key in config}
    override(node, overrides)
    if node["vision"]["num_heads"] is None:
        raise ValueError(
            f"{source.path}: SigLIP's number of heads leaves no trace in its weights and its width "
            f"{eyes['width']} is not a multiple of 72; give overrides={{'vision.num_heads': ...}}"
        )

    links = Links(_torch_links(node, stored, flow=flow, open_pi_zero=open_pi_zero))
    left_out, twins = _torch_left_out(stored, flow=flow)
    left_out += [LeftOut(n, "statistics") for n in source.entries if n.startswith(OLD_STATISTICS)]
    assert kind is not None
    return Found(source, layout, kind, node, links, tuple(left_out), tuple(twins), tuple(notes))


def _torch_links(
    node: Mapping[str, Any], stored: Mapping[str, str], *, flow: bool, open_pi_zero: bool
) -> Iterator[Link]:
    """Links to the names that are stored."""
    mixtures = node["joint"]["mixtures"]
    spelled = [Link("embedding.weight", "embed.weight"), *torch_layout.vision(node["vision"])]
    spelled += torch_layout.mixture(mixtures["vlm"], "joint.mixtures.vlm.", "vlm.")
    if flow:
        reverse = node["time_embedding"]["reverse"]
        spelled += torch_layout.mixture(mixtures["action"], "joint.mixtures.action.", "expert.")
        spelled += torch_layout.flow_heads(node, reverse=reverse, time_first=open_pi_zero)
    for link in spelled:
        if open_pi_zero and link.ours == "joint.mixtures.vlm.final_norm.weight":
            continue  # its language model was built without one
        theirs = stored.get(link.theirs) or _as_stored(link.theirs, stored)
        yield replace(link, theirs=theirs)


def _torch_left_out(
    stored: Mapping[str, str], *, flow: bool
) -> tuple[list[LeftOut], list[tuple[str, str]]]:
    """Tensors that no policy reads, and pairs that must hold the same numbers."""
    left_out, twins = [], []
    for spelled, theirs in stored.items():
        if spelled == "expert.head.weight":
            left_out.append(LeftOut(theirs, "the action expert's word head: read by nothing"))
        elif spelled == "head.weight" and flow:
            left_out.append(LeftOut(theirs, "the word head: a flow policy speaks no words"))
        elif spelled == "head.weight":
            left_out.append(LeftOut(theirs, "the word head, tied to the embedding"))
            twins.append((stored["embed.weight"], theirs))
        elif spelled.startswith("tied.") and (twin := f"expert.{spelled[5:]}") in stored:
            left_out.append(LeftOut(theirs, "state and action share one expert, listed twice"))
            twins.append((stored[twin], theirs))
    return left_out, twins


def _jax(
    source: MergedLora, overrides: dict[str, Any], kind: str | None, notes: list[str]
) -> Found:
    entries = source.entries
    flow = any(n.startswith("action_in_proj/") for n in entries)
    try:
        eyes = jax_layout.vision_sizes(entries)
        vlm = jax_layout.mixture_sizes(entries, "")
        vocab_size = entries[f"{jax_layout.LLM}embedder/input_embedding"].shape[0]
        if flow:
            action = jax_layout.mixture_sizes(entries, "_1")
            kind = "pi05" if action["cond_dim"] is not None else "pi0"
            state = entries["state_proj/kernel"] if kind == "pi0" else None
            node = pizero_node(
                *("openpi", eyes, vlm, action, vocab_size),
                horizon=_horizon({}, 50, overrides, notes),
                action_dim=entries["action_in_proj/kernel"].shape[0],
                state_dim=None if state is None else state.shape[0],
            )
        else:
            kind = kind or "pi0_fast"
            node = language_node(kind, eyes, vlm, vocab_size)
            _note_chunk(kind, node, overrides, notes)
    except KeyError as error:
        raise ValueError(_cannot_size(source, str(error.args[0]))) from error
    override(node, overrides)

    def links() -> Iterator[Link]:
        yield Link("embedding.weight", f"{jax_layout.LLM}embedder/input_embedding")
        yield from jax_layout.vision(node["vision"])
        mixtures = node["joint"]["mixtures"]
        yield from jax_layout.mixture(mixtures["vlm"], "joint.mixtures.vlm.", "")
        if flow:
            yield from jax_layout.mixture(mixtures["action"], "joint.mixtures.action.", "_1")
            yield from jax_layout.flow_heads(node)

    return Found(source, "openpi_jax", kind, node, Links(links()), (), (), tuple(notes))


def _config_beside(path: Path) -> dict[str, Any]:
    """What a `config.json` beside the weights tells of what the weights do not."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        return {}
    try:
        tree = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from error
    found: dict[str, Any] = {}
    for key in ("action_horizon", "chunk_size", "n_action_steps"):
        if key in tree:
            found["horizon"] = tree[key]
            break
    language = tree.get("vlm_config", tree).get("text_config") or {}
    eyes = tree.get("vlm_config", tree).get("vision_config") or {}
    if "num_attention_heads" in language:
        found["num_heads"] = language["num_attention_heads"]
    if "num_attention_heads" in eyes:
        found["vision_heads"] = eyes["num_attention_heads"]
    rope = (language.get("rope_parameters") or {}).get("rope_theta") or language.get("rope_theta")
    if rope is not None:
        found["rope_theta"] = float(rope)
    action = (tree.get("output_features") or {}).get("action") or {}
    if action.get("shape"):
        found["action_dim"] = action["shape"][0]
    known = ("type", "min_period", "max_period", "num_inference_steps", "use_relative_actions")
    for key in known:
        if key in tree:
            found[key] = tree[key]
    return found


def _horizon(
    config: Mapping[str, Any], default: int, overrides: Mapping[str, Any], notes: list[str]
) -> int:
    if "horizon" in config:
        return config["horizon"]
    if "horizon" not in overrides:
        notes.append(
            f"the chunk length is not stored here: {default} assumed, overrides={{'horizon': ...}} "
            "changes it"
        )
    return default


def _note_acting(config: Mapping[str, Any], notes: list[str]) -> None:
    """What a config.json tells of acting that is not done here unless it is asked for."""
    if config.get("type") == "pi05" and "use_relative_actions" not in config:
        notes.append(
            "LeRobot padded the state in pi0.5's prompt before version 0.5; for a policy that was "
            "trained so: changes={'prompt': 'lerobot_pi05'}"
        )
    steps = config.get("num_inference_steps", 10)
    if steps != 10:
        notes.append(f"config.json acts in {steps} Euler steps: num_steps={steps} does here too")


def _note_chunk(
    kind: str, node: Mapping[str, Any], overrides: Mapping[str, Any], notes: list[str]
) -> None:
    """pi0-FAST spells its chunk in tokens: no weight has its sizes."""
    for key in ("horizon", "action_dim"):
        if kind == "pi0_fast" and key not in overrides:
            notes.append(f"{key} is not stored here: {node[key]} assumed")


def _as_stored(spelled: str, stored: Mapping[str, str]) -> str:
    """How a tensor that is missing would be called, going by its neighbours."""
    root = spelled.split(".")[0] + "."
    for other, name in stored.items():
        rest = other.removeprefix(root)
        # Not within a word: `lm_head` is no `head` of something called `lm_`.
        if other.startswith(root) and f".{name}".endswith(f".{rest}"):
            return name.removesuffix(rest) + spelled.removeprefix(root)
    return spelled


def _refuse_conventions(
    source: Source,
    config: Mapping[str, Any],
    node: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> None:
    """What a config.json says beside flow weights has to be what they were trained with."""
    places = [("rope_theta", f"joint.mixtures.{name}.rope_base") for name in ("vlm", "action")]
    places += [(key, f"time_embedding.{key}") for key in ("min_period", "max_period")]
    for key, dotted in places:
        expected: Any = node
        for part in dotted.split("."):
            expected = expected[part]
        if config.get(key, expected) != expected and dotted not in overrides:
            raise ValueError(
                f"{source.path.parent / 'config.json'} has {key} {config[key]:g}, but all "
                f"published weights of this kind were trained with {expected:g}; if these were "
                f"not, say so with overrides={{{dotted!r}: {config[key]:g}}}"
            )


def _refuse_adapters(source: Source) -> None:
    adapters = [n for n in source.entries if ".lora_A." in n or ".lora_B." in n]
    if adapters:
        raise ValueError(
            f"{source.path} holds LoRA adapters ({len(adapters)} tensors such as {adapters[0]}) "
            "for a base that is elsewhere: merge them first (PEFT: merge_and_unload)"
        )


def _cannot_size(source: Source, missing: str) -> str:
    near = get_close_matches(missing, source.entries, n=3, cutoff=0.5)
    return f"{source.path}: the model's sizes cannot be found without {missing}; " + (
        f"nearest stored names: {', '.join(near)}" if near else "no stored name is like it"
    )


def _unknown(source: Source) -> str:
    shown = ", ".join(list(source.entries)[:5])
    return (
        f"{source.path}: no known checkpoint of the pi0 family: {len(source.entries)} tensors, the "
        f"first of them {shown}. Known are PaliGemma, openpi (PyTorch and JAX), LeRobot, "
        "giga-models, transformers' PI0 and open-pi-zero"
    )
