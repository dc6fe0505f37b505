"""A parity case: a folder with weights, inputs, and the numbers that another implementation got.

docs/parity.md describes the files. Nothing here knows how a model computes; this is what the case
says, in pizero's terms.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pizero.agent.weights.lora import SCALES
from pizero.agent.weights.orbax import METADATA
from pizero.agent.weights.shards import SAFETENSORS_INDEX, TORCH_INDEX
from pizero.agent.weights.source import TORCH_SUFFIXES
from pizero.types import Observation, Tensor

IO, GRADIENTS, FACTS = "io.safetensors", "gradients.safetensors", "case.json"
# What training programs keep beside weights, by file or folder name.
COMPANION = re.compile(
    r"(optimizer|scheduler|metadata|rng_|random_states|policy_(pre|post)processor).*"
    r"|train_state|training_state"
)
FLOW = ("pi0", "pi05", "open_pi_zero")
FAST = "pi0_fast"
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class Case:
    """What a folder holds. `io` has `in.*` and `out.*`; `gradients` goes by parameter name."""

    folder: Path
    facts: Mapping[str, Any]
    io: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    sources: tuple[Path, ...]

    @property
    def name(self) -> str:
        return self.facts.get("case", self.folder.name)

    @property
    def family(self) -> str:
        """The family, however it is written: pi0.5, pi0-fast, open-pi-zero."""
        return _plain(self.facts["family"])

    @property
    def dims(self) -> Mapping[str, Any]:
        return self.facts.get("dims", {})

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of the plain `out.*` tensors."""
        return DTYPES[self.facts.get("dtype", "float32")]

    @property
    def kind(self) -> str | None:
        """What the loader cannot see: a PaliGemma that speaks actions."""
        return FAST if self.family == FAST else None

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What has to be met."""
        return {name: x for name, x in self.io.items() if name.startswith("out.")}

    @cached_property
    def cameras(self) -> tuple[str, ...]:
        """Camera names in the order of their tokens: as `cameras` lists them, else as the words on
        images do, else as `io_file` lists them, else by name."""
        names = {n.removeprefix("in.image.") for n in self.io if n.startswith("in.image.")}
        listed = self.facts.get("cameras", self.dims.get("cameras"))
        if listed is not None:
            if set(listed) != names:
                raise ValueError(f"cameras are {sorted(names)} in {IO}, {list(listed)} in {FACTS}")
            return tuple(listed)
        words = str(self.facts.get("conventions", {}).get("images", ""))
        at = {name: re.search(rf"\b{re.escape(name)}\b", words) for name in names}
        found = {name: match.start() for name, match in at.items() if match}
        if len(found) == len(names):
            return tuple(sorted(names, key=lambda name: found[name]))
        in_file = list(self.facts.get("io_file", {}).get("tensors", ()))
        order = {n.removeprefix("in.image."): i for i, n in enumerate(in_file)}
        return tuple(sorted(names, key=lambda name: (order.get(name, len(order)), name)))

    def overrides(self) -> dict[str, Any]:
        """What the case states and weights cannot tell, for the loader."""
        dims, found = self.dims, {}
        for name, key in (("vlm", "vlm"), ("action", "action_expert")):
            if name == "action" and self.family not in FLOW:
                continue
            sizes = dims.get(key, {})
            lora = dims.get("lora", self.facts.get("lora", {}))
            found[SCALES[name]] = _lora_scale(sizes.get("lora", lora.get(key, lora)))
            found[f"joint.mixtures.{name}.num_heads"] = sizes.get("num_heads")
            theta = sizes.get("rope_theta", dims.get("rope_theta"))
            found[f"joint.mixtures.{name}.rope_base"] = None if theta is None else float(theta)
        found["vision.num_heads"] = dims.get("vision", {}).get("num_heads")
        chunks = [self.io[n].shape[1] for n in ("in.actions", "in.noise") if n in self.io]
        found["horizon"] = dims.get("action_horizon", chunks[0] if chunks else None)
        if self.family in FLOW:
            found["flow.sig_min"] = dims.get("flow_sig_min")
            found["time_embedding.min_period"] = dims.get("time_min_period")
            longest = dims.get("time_max_period")
            if longest is not None and self.family == "open_pi_zero":
                longest = 2 * math.pi * longest  # its angles are t / period, without the 2 pi
            found["time_embedding.max_period"] = longest
        said = {key: value for key, value in found.items() if value is not None}
        # Here nothing is an answer: no soft-cap, no clip.
        if "attention_softcap" in dims:
            said["joint.softcap"] = dims["attention_softcap"]
        if "final_action_clip_value" in dims and self.family in FLOW:
            said["action_clip"] = dims["final_action_clip_value"]
        return said

    def images(self, prefix: str = "in.") -> tuple[Tensor, Tensor | None]:
        """Pictures [b cameras 3 h w], and which are there [b cameras], None if nothing says."""
        if "in.image" in self.io:
            return self.io["in.image"][:, None], None
        images = torch.stack([self._find(f"{prefix}image.{c}") for c in self.cameras], dim=1)
        masks = [self.mask(f"{prefix}image_mask.{c}") for c in self.cameras]
        if all(mask is None for mask in masks):
            return images, None
        ones = torch.ones(images.shape[0], dtype=torch.bool)
        return images, torch.stack([ones if m is None else m for m in masks], dim=1)

    def mask(self, name: str) -> Tensor | None:
        """A mask, if there is one; programs keep them as integers too."""
        return self.io[name].bool() if name in self.io else None

    def _find(self, name: str) -> Tensor:
        if name not in self.io:
            raise ValueError(f"{self.folder / IO} lacks {name}")
        return self.io[name]

    def flow_observation(self, *, takes_state: bool) -> Observation:
        """The inputs of a flow policy. open-pi-zero's ids begin with a place for each picture
        token, which are no words."""
        images, image_mask = self.images()
        if "in.input_ids" in self.io:
            ids = self._find("in.input_ids")
            mask = self.mask("in.attention_mask")
            places = self._picture_places(ids)
            tokens, token_mask = ids[:, places:], None if mask is None else mask[:, places:]
        else:
            tokens, token_mask = self._find("in.tokens"), self.mask("in.token_mask")
        state = self.io.get("in.proprio", self.io.get("in.state")) if takes_state else None
        if state is not None and state.ndim == 2:
            state = state[:, None]
        return Observation(
            images=images, tokens=tokens, image_mask=image_mask, token_mask=token_mask, state=state
        )

    def _picture_places(self, ids: Tensor) -> int:
        index = self.dims.get("image_token_index")
        if index is None:
            per_image = self.dims.get("vision", {}).get("tokens_per_image")
            if per_image is None:
                raise ValueError(f"{FACTS}: dims lacks image_token_index, the id of picture tokens")
            return per_image * max(1, len(self.cameras))
        is_picture = ids == index
        count = int(is_picture[0].sum())
        if not (is_picture[:, :count].all() and not is_picture[:, count:].any()):
            raise ValueError(
                f"in.input_ids: expected the same number of picture tokens (id {index}) at the "
                "start of every row"
            )
        return count


def read_case(folder: str | Path) -> Case:
    """Read a case folder. Raises ValueError where it is none."""
    folder = Path(folder)
    for name in (FACTS, IO):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no parity case: it lacks {name} (see docs/parity.md)")
    try:
        facts = json.loads((folder / FACTS).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / FACTS} is not JSON: {error}") from error
    families = (*FLOW, FAST)
    if not isinstance(facts, dict) or _plain(str(facts.get("family"))) not in families:
        got = facts.get("family") if isinstance(facts, dict) else facts
        raise ValueError(f"{folder / FACTS}: family must be one of {list(families)}, got {got!r}")
    if facts.get("dtype", "float32") not in DTYPES:
        raise ValueError(
            f"{folder / FACTS}: dtype must be one of {list(DTYPES)}, got {facts['dtype']!r}"
        )
    for row in facts.get("tolerance_rows", []):
        if "match" not in row:
            raise ValueError(f'{folder / FACTS}: the tolerance row {row} lacks "match"')
    gradients = _load(folder / GRADIENTS) if (folder / GRADIENTS).is_file() else {}
    return Case(
        folder,
        facts,
        _load(folder / IO),
        {name.removeprefix("grad."): x for name, x in gradients.items()},
        tuple(_find_sources(folder)),
    )


def _lora_scale(lora: Mapping[str, Any]) -> float | None:
    """What attention's LoRA is multiplied by, of openpi's settings; None where nothing says."""
    lora = lora.get("attn", lora)
    if "alpha" not in lora:
        return None
    rank = lora["rank"]
    return lora["alpha"] / (math.sqrt(rank) if lora.get("rslora") else rank)


def _plain(family: str) -> str:
    return family.lower().replace("-", "_").replace(".", "")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _find_sources(folder: Path) -> list[Path]:
    """Every set of weights in the folder: files of its own, and folders that are checkpoints."""
    shards: set[str] = set()
    found = []
    for suffix in (SAFETENSORS_INDEX, TORCH_INDEX):
        for index in sorted(folder.glob(f"*{suffix}")):
            shards |= set(json.loads(index.read_text()).get("weight_map", {}).values())
            found.append(index)
    for path in sorted(folder.iterdir()):
        if COMPANION.fullmatch(path.name):
            continue
        if path.is_dir():
            found += _checkpoints_below(path)
        elif path.name.endswith((".safetensors", *TORCH_SUFFIXES)) and path.name not in (
            *(IO, GRADIENTS),
            *shards,
        ):
            found.append(path)
    if not found:
        raise ValueError(f"{folder} holds no weights: expected weights.safetensors, a .pt file, or "
                         "a checkpoint folder")  # fmt: skip
    # weights.safetensors first: the names of gradients are its names
    return sorted(found, key=lambda path: path.name != "weights.safetensors")


def _checkpoints_below(folder: Path, depth: int = 3) -> list[Path]:
    if _has_weights(folder):
        return [folder]
    inner = sorted(path for path in folder.iterdir() if path.is_dir()) if depth else []
    inner = [path for path in inner if not COMPANION.fullmatch(path.name)]
    return [found for path in inner for found in _checkpoints_below(path, depth - 1)]


def _has_weights(folder: Path) -> bool:
    inner = [folder / METADATA, folder / "params" / METADATA]
    pattern = re.compile(r".*(\.safetensors|\.pt|\.pth|\.bin)(\.index\.json)?")
    return any(path.is_file() for path in inner) or any(
        pattern.fullmatch(path.name) and not COMPANION.fullmatch(path.name)
        for path in folder.iterdir()
    )
