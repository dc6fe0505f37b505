"""Vision towers: SigLIP, and a small convolutional one for policies trained from scratch.

Every tower maps images [n 3 height width] in [-1, 1] to tokens [n tokens width] in one call,
whatever cameras and frames they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from pizero.model.containers import Stack
from pizero.types import Float, Tensor


class VisionTower(nn.Module):
    """What a policy asks of a tower: tokens of one width, a known number for each image."""

    image_size: tuple[int, int]
    num_tokens: int
    width: int

    def compile_layers(self, **options: Any) -> None:
        """Compile the repeated layer, where there is one."""


class SigLIP(VisionTower):
    """The SigLIP image encoder (Zhai et al. 2023) without its pooling head, as PaliGemma uses it.

    The default sizes are So400m/14 at 224 px: 256 tokens of width 1152.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 14,
        width: int = 1152,
        depth: int = 27,
        mlp_dim: int = 4304,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.image_size = (image_size, image_size)
        self.num_tokens = (image_size // patch_size) ** 2
        self.width = width
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.randn(self.num_tokens, width) * width**-0.5)
        self.blocks = Stack[SigLIPBlock](
            SigLIPBlock(width=width, mlp_dim=mlp_dim, num_heads=num_heads) for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n tokens width"]:
        check_image_size(images, self.image_size)
        x = self.patch_embedding(images.to(self.patch_embedding.weight.dtype))
        x = rearrange(x, "n d h w -> n (h w) d") + self.position_embedding
        x = x.to(self.blocks[0].qkv_proj.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def compile_layers(self, **options: Any) -> None:
        for block in self.blocks:
            block.compile(fullgraph=True, **options)


class SigLIPBlock(nn.Module):
    """LayerNorm, full attention, LayerNorm, tanh-GELU MLP, each with a residual."""

    def __init__(self, *, width: int, mlp_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.up_proj = nn.Linear(width, mlp_dim)
        self.down_proj = nn.Linear(mlp_dim, width)

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        qkv = self.qkv_proj(self.attention_norm(x))
        q, k, v = rearrange(qkv, "n s (three h d) -> three n h s d", three=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.o_proj(rearrange(attended, "n h s d -> n s (h d)"))
        h = F.gelu(self.up_proj(self.mlp_norm(x)), approximate="tanh")
        return x + self.down_proj(h)


class ConvTower(VisionTower):
    """Strided convolutions down to a grid of tokens: sees well from few demonstrations.

    Each entry of `widths` halves the picture; the last is the token width. Position embeddings are
    learned; a group norm keeps the stages in range.
    """

    def __init__(self, *, image_size: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        height, width = image_size
        stride = 2 ** len(widths)
        if height % stride or width % stride:
            raise ValueError(
                f"image_size {height}x{width} must be a multiple of {stride}, two to the number of "
                f"widths ({len(widths)})"
            )
        self.image_size = (height, width)
        self.num_tokens = (height // stride) * (width // stride)
        self.width = widths[-1]
        stages = []
        for before, after in zip((3, *widths), widths, strict=False):
            stages += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(1, after),
                nn.SiLU(),
            ]
        self.stages = nn.Sequential(*stages)
        self.position_embedding = nn.Parameter(torch.randn(self.num_tokens, self.width) * 0.02)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n tokens width"]:
        check_image_size(images, self.image_size)
        # channels last: a third faster on CPUs, no slower on GPUs
        dtype = next(self.stages.parameters()).dtype
        images = images.to(dtype, memory_format=torch.channels_last)
        x = self.stages(images)
        return rearrange(x, "n d h w -> n (h w) d") + self.position_embedding


def check_image_size(images: Tensor, expected: tuple[int, int]) -> None:
    """Raise ValueError when pictures do not have the size a tower was built for."""
    got = tuple(images.shape[-2:])
    if got != expected:
        raise ValueError(
            f"the vision tower expects images of {expected} (height, width), got {got}"
        )
