"""One expert: a stack of blocks with its own weights and width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from pizero.model.block import Block, BlockModulation
from pizero.model.containers import Stack
from pizero.model.norm import AdaRMSNorm, Modulation, make_norm
from pizero.model.rope import Rotary, rotary_table
from pizero.types import Float, Int, Tensor


class MixtureModulation(NamedTuple):
    """What the flow time does to one expert; made once for all Euler steps."""

    blocks: tuple[BlockModulation, ...]
    final: Modulation | None

    def step(self, i: int) -> MixtureModulation:
        """The modulation of Euler step `i`, from one made for all steps."""
        return MixtureModulation(
            tuple(b.step(i) for b in self.blocks),
            self.final.step(i) if self.final else None,
        )


class Mixture(nn.Module):
    """The blocks and the final norm of one expert.

    `cond_dim` makes its norms adaptive (pi0.5's action expert). `kv_only_tail` leaves out what the
    last layer computes beyond keys and values, and the final norm: 109 M weights of PaliGemma that
    a flow policy never reads. Published checkpoints hold them; their loaders say so.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        mlp_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_base: float = 10_000.0,
        cond_dim: int | None = None,
        kv_only_tail: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        if head_dim % 2:
            raise ValueError(f"head_dim must be even to rotate halves, got {head_dim}")
        self.width, self.depth, self.head_dim = width, depth, head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.rope_base, self.cond_dim, self.kv_only_tail = rope_base, cond_dim, kv_only_tail
        self.blocks = Stack[Block](
            Block(
                width=width,
                mlp_dim=mlp_dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                cond_dim=cond_dim,
                kv_only=kv_only_tail and i == depth - 1,
                norm_eps=norm_eps,
            )
            for i in range(depth)
        )
        self.final_norm = (
            None if kv_only_tail else make_norm(width, cond_dim=cond_dim, eps=norm_eps)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype its tokens run in."""
        return self.blocks[0].kv_proj.weight.dtype

    def rotary(self, positions: Int[Tensor, "b s"]) -> Rotary:
        """This expert's rotations of tokens at `positions`."""
        return rotary_table(positions, head_dim=self.head_dim, base=self.rope_base)

    def modulate(self, cond: Float[Tensor, "rows cond_dim"]) -> MixtureModulation:
        """The modulation of every norm, a row for each row of `cond`."""
        norm = self.final_norm
        final = norm.modulation(cond) if isinstance(norm, AdaRMSNorm) else None
        return MixtureModulation(tuple(block.modulate(cond) for block in self.blocks), final)

    def finish(
        self, x: Float[Tensor, "b s width"], modulation: MixtureModulation | None = None
    ) -> Float[Tensor, "b s width"]:
        """The final norm."""
        if self.final_norm is None:
            raise ValueError("an expert built with kv_only_tail has no output to finish")
        return self.final_norm(x, modulation and modulation.final)

    def unread_parameters(self) -> list[nn.Parameter]:
        """Weights without effect when only this expert's keys and values are read."""
        if self.final_norm is None:
            return []
        read = ("attention_norm", "kv_proj")
        tail = [m for name, m in self.blocks[-1].named_children() if name not in read]
        return [p for m in (*tail, self.final_norm) for p in m.parameters()]
