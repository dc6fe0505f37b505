"""Attention of one block of queries to everything it may see.

Grouped queries are folded into the query length, so several heads share a key without copies of
it, and every backend of PyTorch can be used. With one key head for all, folding is a view.

Axes: b batch, s queries, t keys, h query heads, g key heads, r = h / g, d head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange

from pizero.types import Bool, Float, Tensor


def attend(
    q: Float[Tensor, "b s h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g d"],
    *,
    key_mask: Bool[Tensor, "_ t"] | None = None,
    sight: Bool[Tensor, "_ s t"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b s h d"]:
    """Softmax attention; `key_mask` is True where a key is real, None when all are.

    Where queries see different keys, `sight` says which, in place of `key_mask`.

    `softcap` bounds logits to `softcap * tanh(logits / softcap)` as Gemma 2 and open-pi-zero do;
    no fused kernel offers it, so that path writes the scores out.
    """
    heads, groups = q.shape[2], k.shape[2]
    q = rearrange(q, "b s (g r) d -> b g (s r) d", g=groups)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if sight is not None:
        mask = sight.repeat_interleave(heads // groups, dim=1)[:, None]
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q @ k.mT).to(wide) * q.shape[-1] ** -0.5
        logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask, torch.finfo(wide).min)
        out = logits.softmax(dim=-1).to(v.dtype) @ v
    return rearrange(out, "b g (s r) d -> b s (g r) d", r=heads // groups)
