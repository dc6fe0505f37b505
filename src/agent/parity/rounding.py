"""bfloat16 in other orders of rounding than our own.

A bfloat16 result is one of many: it depends on where numbers are rounded between operations, and on
the kernels. Ours rounds less than the originals do, so numbers made by them are compared with what
the same model gives when it rounds where openpi's PyTorch code does: rotary frequencies, tables and
products in bfloat16, attention scores written out and rounded before the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from pizero.model import block, joint, mixture
from pizero.model.rope import Rotary
from pizero.types import Tensor

Swap = tuple[ModuleType, str, Callable]


@contextmanager
def rounded_as_openpi() -> Iterator[None]:
    """Inside, models round where openpi's PyTorch code does. For one thread, and this tool only."""
    swaps: list[Swap] = [
        (mixture, "rotary_table", _rotary_table),
        (block, "rotate", _rotate),
        (joint, "attend", _attend),
    ]
    before = [getattr(module, name) for module, name, _ in swaps]
    for module, name, function in swaps:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(swaps, before, strict=True):
            setattr(module, name, function)


def _rotary_table(positions: Tensor, *, head_dim: int, base: float) -> Rotary:
    planes = torch.arange(0, head_dim, 2, device=positions.device).float()
    frequency = (1.0 / base ** (planes / head_dim)).bfloat16().float()
    angle = positions[..., None, None].float() * frequency
    return Rotary(angle.cos(), angle.sin())


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = (torch.cat((table, table), dim=-1).to(x.dtype) for table in rotary)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    sight: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = (q.transpose(1, 2) @ k.mT) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = sight if key_mask is None else key_mask[:, None]
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2)
