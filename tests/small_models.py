"""Small policies and observations for tests, composed from the shipped configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn

from pizero.agent.config import build
from pizero.model import PiZero
from pizero.types import Observation

CONFIG = Path(__file__).parents[1] / "config"

# The full-size files with every size reduced: 2 layers, 4 tokens for a picture.
SMALL = {
    "vision": dict(image_size=8, patch_size=4, width=12, depth=2, mlp_dim=20, num_heads=2),
    "joint.mixtures.vlm": dict(width=16, depth=2, mlp_dim=24, num_heads=4, head_dim=8),
    "joint.mixtures.action": dict(width=12, depth=2, mlp_dim=20, num_heads=4, head_dim=8),
    None: dict(vocab_size=32, horizon=5, action_dim=3),
}
KINDS = ("toy", "demo", "pi0", "pi05")


def compose_model(name: str, *overrides: str) -> DictConfig:
    """The `model` node that config/model/<name>.yaml gives with `overrides`."""
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        return compose(f"model/{name}", overrides=list(overrides)).model


def set_sizes(sizes: dict[str | None, dict[str, object]]) -> list[str]:
    """Overrides that give nodes of the model these sizes."""
    return [
        f"model.{f'{node}.{key}' if node else key}={value}"
        for node, values in sizes.items()
        for key, value in values.items()
    ]


def small_overrides(kind: str) -> list[str]:
    """What makes a shipped model small; the toy and the demo already are."""
    if kind in ("toy", "demo"):
        return []
    extra = ["model.joint.mixtures.action.cond_dim=12"] if kind == "pi05" else []
    return [*set_sizes(SMALL), *extra, *(["model.state_dim=3"] if kind == "pi0" else [])]


def small_policy(kind: str = "toy", *overrides: str, seed: int | None = 0) -> PiZero:
    """A small policy of a shipped kind, randomised; without a seed, as it starts training."""
    model = build(compose_model(kind, *small_overrides(kind), *overrides))
    return model if seed is None else randomise(model, seed)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, norms and biases too, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def small_observation(
    model: PiZero,
    *,
    batch: int = 2,
    cameras: int = 2,
    text: int = 4,
    frames: int = 1,
    seed: int = 0,
) -> Observation:
    """A random observation that fits a policy: everything present, no masks."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, cameras, 3, *model.vision.image_size)
    vocab = model.embedding.num_embeddings
    state = None
    if model.state_dim is not None:
        state = torch.randn(batch, frames, model.state_dim, generator=generator)
    return Observation(
        images=torch.rand(size, generator=generator) * 2 - 1,
        tokens=torch.randint(vocab, (batch, text), generator=generator),
        state=state,
    )


def small_flow(
    model: PiZero, *, batch: int = 2, samples: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Actions, noise and flow times."""
    generator = torch.Generator().manual_seed(seed)
    chunk = (model.horizon, model.action_dim)
    return (
        torch.randn(batch, *chunk, generator=generator),
        torch.randn(batch, samples, *chunk, generator=generator),
        torch.rand(batch, samples, generator=generator),
    )
