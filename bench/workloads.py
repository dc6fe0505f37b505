"""The four standard workloads: their models, their inputs, and every matrix product they need.

The list of products is the yardstick. Its sum is what `bench.invariants` expects the operation
counter to find, and `bench.roofline` turns it into a floor in milliseconds. It is written from the
sizes of the model alone, not from its code, so that a wasted product shows up as a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hydra import compose, initialize_config_dir

from pizero.agent.config import build, config_dir
from pizero.model import PiZero, SigLIP
from pizero.types import Batch, Observation, Tensor

NUM_STEPS = 10  # Euler steps of every workload


@dataclass(frozen=True)
class Workload:
    """One observation as a published system sees it; `model` is a file of config/model."""

    name: str
    model: str
    num_cameras: int
    num_words: int
    horizon: int
    mirrors: str


WORKLOADS = {
    w.name: w
    for w in (
        Workload("A", "pi0", 1, 20, 4, "open-pi-zero on bridge and fractal"),
        Workload("B", "pi0", 3, 48, 50, "openpi pi0 with three cameras"),
        Workload("C", "pi05", 3, 200, 50, "openpi and LeRobot pi0.5, state in the prompt"),
        Workload("D", "pi0", 2, 48, 50, "LIBERO with its two real cameras"),
    )
}

# The same structure, a thousand times smaller: for smoke runs and checks that need real tensors.
_SMALL = (
    "vision.image_size=56",
    "vision.width=64",
    "vision.depth=2",
    "vision.mlp_dim=240",
    "vision.num_heads=4",
    "vocab_size=512",
    *(f"joint.mixtures.{name}.depth=3" for name in ("vlm", "action")),
    *(f"joint.mixtures.{name}.num_heads=4" for name in ("vlm", "action")),
    *(f"joint.mixtures.{name}.head_dim=32" for name in ("vlm", "action")),
    "joint.mixtures.vlm.width=128",
    "joint.mixtures.vlm.mlp_dim=1024",
    "joint.mixtures.action.width=64",
    "joint.mixtures.action.mlp_dim=256",
)
SIZES = ("full", "small")


def build_model(workload: Workload, *, size: str = "full", depth: int | None = None) -> PiZero:
    """The workload's policy with random weights, on the default device; `depth` cuts the stacks."""
    changes = [f"horizon={workload.horizon}"]
    if size == "small":
        changes += _SMALL
        if workload.model == "pi05":
            changes.append("joint.mixtures.action.cond_dim=64")
    elif size != "full":
        raise ValueError(f"size must be one of {SIZES}, got {size!r}")
    if depth is not None:
        changes.append(f"vision.depth={depth}")
        changes += (f"joint.mixtures.{name}.depth={depth}" for name in ("vlm", "action"))
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose(f"model/{workload.model}", [f"model.{change}" for change in changes])
    model = build(config.model)
    with torch.no_grad():
        # Adaptive norms start closed: an expert that passes its input through would prove nothing.
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model


def make_observation(workload: Workload, model: PiZero, *, batch: int, seed: int) -> Observation:
    """Random pictures, words and state, all present, on the default device."""
    generator = torch.Generator().manual_seed(seed)
    height, width = model.vision.image_size
    images = torch.randint(
        0, 256, (batch, workload.num_cameras, 3, height, width), generator=generator, device="cpu"
    )
    words = (batch, workload.num_words)
    tokens = torch.randint(
        0, model.embedding.num_embeddings, words, generator=generator, device="cpu"
    )
    state = None
    if model.state_dim is not None:
        state = torch.randn(batch, 1, model.state_dim, generator=generator, device="cpu")
    observation = Observation(images=images.to(torch.uint8), tokens=tokens, state=state)
    return observation.to(torch.get_default_device())


def make_noise(model: PiZero, *, batch: int, seed: int, samples: int | None = None) -> Tensor:
    """Noise for `sample`, or for `forward` when the number of flow samples is given."""
    rows = (batch,) if samples is None else (batch, samples)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*rows, model.horizon, model.action_dim, generator=generator, device="cpu")
    return noise.to(torch.get_default_device())


def make_batch(workload: Workload, model: PiZero, *, batch: int, seed: int) -> Batch:
    """A training batch in which every action counts."""
    actions = make_noise(model, batch=batch, seed=seed + 1)
    return Batch(
        observation=make_observation(workload, model, batch=batch, seed=seed),
        actions=actions,
        action_mask=torch.ones_like(actions, dtype=torch.bool),
        sample=torch.arange(batch),
    )


def siglip(model: PiZero) -> SigLIP:
    """The vision tower, which is a SigLIP in every workload."""
    assert isinstance(model.vision, SigLIP)
    return model.vision


@dataclass(frozen=True)
class Product:
    """`count` matrix products [m k] @ [k n]; the [k n] side is weights, keys or values."""

    stage: str
    m: int
    n: int
    k: int
    count: int = 1

    @property
    def flops(self) -> int:
        """A multiply and an add count as two."""
        return 2 * self.m * self.n * self.k * self.count

    def bytes(self, width: int) -> int:
        """What must be read if every element of the [k n] side takes `width` bytes."""
        return self.n * self.k * self.count * width


STAGES = ("vision", "prefix", "state", "tables", "step")


def products(workload: Workload, model: PiZero, *, num_steps: int = NUM_STEPS) -> list[Product]:
    """All matrix products of `sample` for one observation.

    Stages: "vision" with the projector; "prefix", pictures and words through the vlm; "state", its
    token through the action expert, once; "tables", what depends on the flow time alone; "step",
    the chunk through the action expert, `num_steps` times.
    """
    vlm, action = model.joint.mixtures[model.vlm], model.joint.mixtures[model.action]
    prefix = workload.num_cameras * model.vision.num_tokens + workload.num_words
    num_states = 0 if model.state_dim is None else 1
    found = list(_vision(model, workload.num_cameras))
    # The vlm's last layer makes keys and values only: nobody reads its tokens.
    found += _expert("prefix", vlm, tokens=prefix, keys=prefix, times=1, read=False)
    if model.state_dim is not None:
        found.append(Product("state", 1, action.width, model.state_dim))
        found += _expert("state", action, tokens=1, keys=prefix + 1, times=1, read=False)
    width = action.width
    if action.cond_dim is None:
        found.append(Product("tables", num_steps, width, width))
    else:
        found.append(Product("tables", num_steps, width, width, count=2))
        found.append(Product("tables", num_steps, 3 * width, width, count=2 * action.depth + 1))
    s = workload.horizon
    found.append(Product("step", s, width, model.action_dim, count=num_steps))
    if action.cond_dim is None:
        found.append(Product("step", s, width, width, count=2 * num_steps))
    keys = prefix + num_states + s
    found += _expert("step", action, tokens=s, keys=keys, times=num_steps, read=True)
    found.append(Product("step", s, model.action_dim, width, count=num_steps))
    return found


def stage_flops(found: list[Product], stage: str) -> int:
    return sum(p.flops for p in found if p.stage == stage)


def _vision(model: PiZero, num_images: int) -> Iterator[Product]:
    tower = siglip(model)
    block = tower.blocks[0]
    depth, width, heads = len(tower.blocks), tower.width, block.num_heads
    per_image, m = tower.num_tokens, num_images * tower.num_tokens
    mlp = block.up_proj.out_features
    yield Product("vision", m, width, tower.patch_embedding.weight[0].numel())
    yield Product("vision", m, 3 * width, width, depth)
    yield Product("vision", per_image, per_image, width // heads, depth * heads * num_images)
    yield Product("vision", per_image, width // heads, per_image, depth * heads * num_images)
    yield Product("vision", m, width, width, depth)
    yield Product("vision", m, mlp, width, depth)
    yield Product("vision", m, width, mlp, depth)
    yield Product("vision", m, model.projector.out_features, width)


def _expert(
    stage: str, mixture, *, tokens: int, keys: int, times: int, read: bool
) -> Iterator[Product]:
    width, heads, groups = mixture.width, mixture.num_heads, mixture.num_kv_heads
    dim, mlp = mixture.head_dim, mixture.blocks[0].down_proj.in_features
    full = times * (mixture.depth if read else mixture.depth - 1)
    yield Product(stage, tokens, 2 * groups * dim, width, times * mixture.depth)
    yield Product(stage, tokens, heads * dim, width, full)
    # Heads that share keys count as queries, so each key and value is read once.
    queries = tokens * heads // groups
    yield Product(stage, queries, keys, dim, full * groups)
    yield Product(stage, queries, dim, keys, full * groups)
    yield Product(stage, tokens, width, heads * dim, full)
    yield Product(stage, tokens, 2 * mlp, width, full)
    yield Product(stage, tokens, width, mlp, full)
