"""Hydra nodes of models of given sizes, with the conventions of `config/compat/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from omegaconf import OmegaConf

from pizero.agent.config import config_dir


def pizero_node(
    compat: str,
    vision: Mapping[str, Any],
    vlm: Mapping[str, Any],
    action: Mapping[str, Any],
    vocab_size: int,
    *,
    horizon: int,
    action_dim: int,
    state_dim: int | None,
) -> dict[str, Any]:
    """The Hydra node of a flow policy of these sizes, with the conventions of `compat`."""
    tail = {"vlm": True, "action": False}  # nobody reads the language model's last layer
    conventions = OmegaConf.load(config_dir() / "compat" / f"{compat}.yaml")
    sizes = {
        "_target_": "pizero.model.PiZero",
        "vision": {"_target_": "pizero.model.SigLIP", **vision},
        "joint": {
            "_target_": "pizero.model.JointModel",
            "mixtures": {
                name: {
                    "_target_": "pizero.model.Mixture",
                    **mixture,
                    "rope_base": 10_000.0,
                    "kv_only_tail": tail[name],
                }
                for name, mixture in (("vlm", vlm), ("action", action))
            },
        },
        "vocab_size": vocab_size,
        "horizon": horizon,
        "action_dim": action_dim,
        "state_dim": state_dim,
        "streams": {},
        "stop_grad": [],
    }
    node = OmegaConf.to_container(OmegaConf.merge(sizes, conventions))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def language_node(
    kind: str, vision: Mapping[str, Any], vlm: Mapping[str, Any], vocab_size: int
) -> dict[str, Any]:
    """The Hydra node of a PaliGemma of these sizes that speaks words or actions."""
    if kind not in ("paligemma", "pi0_fast"):
        raise ValueError(
            f"these weights hold no action expert: expected kind 'paligemma' or 'pi0_fast', got "
            f"{kind!r}"
        )
    files = ["paligemma"] + ["pi0_fast"] * (kind == "pi0_fast")
    layers = [OmegaConf.load(config_dir() / "model" / f"{name}.yaml") for name in files]
    sizes = {
        "vision": {"_target_": "pizero.model.SigLIP", **vision},
        "joint": {
            "_target_": "pizero.model.JointModel",
            "mixtures": {"vlm": {"_target_": "pizero.model.Mixture", **vlm, "rope_base": 10_000.0}},
        },
    }
    node = OmegaConf.to_container(OmegaConf.merge(*layers, sizes, {"vocab_size": vocab_size}))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items() if key != "defaults"}


def override(node: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set dotted keys of a node. Raises ValueError, with the nearest name, for one it lacks."""
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        inner: Any = node
        for part in path:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last not in inner:
            known = list(_dotted(node))
            near = get_close_matches(dotted, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {known}"
            raise ValueError(f"the model has no {dotted!r} to override{hint}")
        inner[last] = value


def _dotted(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}"
