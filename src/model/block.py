"""One layer of one expert, in the two halves that attention separates: `project` and `finish`.

Axes: b batch, s tokens, h query heads, g key heads, d head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from pizero.model.norm import AdaRMSNorm, Modulation, make_norm
from pizero.model.rope import Rotary, rotate
from pizero.types import Float, Tensor


class BlockModulation(NamedTuple):
    """What the flow time does to the two norms of a block."""

    attention: Modulation
    mlp: Modulation

    def step(self, i: int) -> BlockModulation:
        """Row `i` of a table that has a row for each Euler step."""
        return BlockModulation(self.attention.step(i), self.mlp.step(i))


class Block(nn.Module):
    """Norm, grouped-query attention with rotary positions, norm, GeGLU (Gemma's layer).

    With `cond_dim` the norms are adaptive and gate their branches. With `kv_only` the block has
    keys and values alone: the last layer of an expert whose output nobody reads.
    """

    def __init__(
        self,
        *,
        width: int,
        mlp_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        cond_dim: int | None = None,
        kv_only: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm = make_norm(width, cond_dim=cond_dim, eps=norm_eps)
        self.kv_proj = nn.Linear(width, 2 * num_kv_heads * head_dim, bias=False)
        self.kv_only = kv_only
        if not kv_only:
            self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
            self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)
            self.mlp_norm = make_norm(width, cond_dim=cond_dim, eps=norm_eps)
            self.gate_up_proj = nn.Linear(width, 2 * mlp_dim, bias=False)
            self.down_proj = nn.Linear(mlp_dim, width, bias=False)

    def modulate(self, cond: Float[Tensor, "rows cond_dim"]) -> BlockModulation:
        """The modulation of this block, a row for each row of `cond`."""
        norms = (self.attention_norm, self.attention_norm if self.kv_only else self.mlp_norm)
        return BlockModulation(*(n.modulation(cond) for n in norms if isinstance(n, AdaRMSNorm)))

    def project(
        self,
        x: Float[Tensor, "b s width"],
        rotary: Rotary,
        modulation: BlockModulation | None = None,
        *,
        query_from: int = 0,
    ) -> tuple[Tensor | None, Float[Tensor, "b s g d"], Float[Tensor, "b s g d"]]:
        """Rotated queries and keys, and values.

        Tokens before `query_from` get no query: nobody reads their result. None if none does.
        """
        h = self.attention_norm(x, modulation and modulation.attention)
        k, v = rearrange(self.kv_proj(h), "b s (two g d) -> two b s g d", two=2, d=self.head_dim)
        k = rotate(k, rotary)
        if query_from == x.shape[1]:
            return None, k, v
        if query_from:
            h, rotary = h[:, query_from:], Rotary(*(r[:, query_from:] for r in rotary))
        q = rearrange(self.q_proj(h), "b s (h d) -> b s h d", d=self.head_dim)
        return rotate(q, rotary), k, v

    def finish(
        self,
        x: Float[Tensor, "b s width"],
        attended: Float[Tensor, "b s h d"],
        modulation: BlockModulation | None = None,
    ) -> Float[Tensor, "b s width"]:
        """Output projection, residual, GeGLU, residual."""
        branch = self.o_proj(rearrange(attended, "b s h d -> b s (h d)"))
        x = x + (modulation.attention.gate.to(x.dtype) * branch if modulation else branch)
        h = self.mlp_norm(x, modulation and modulation.mlp)
        gate, up = self.gate_up_proj(h).chunk(2, dim=-1)
        branch = self.down_proj(F.gelu(gate, approximate="tanh") * up)
        return x + (modulation.mlp.gate.to(x.dtype) * branch if modulation else branch)
