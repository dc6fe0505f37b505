"""What every model here is made of: eyes, words, and experts that meet in attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from einops import rearrange
from torch import nn

from pizero.model.joint import JointModel
from pizero.model.layout import TokenLayout, did_you_mean
from pizero.model.vision import VisionTower
from pizero.types import Bool, Float, Observation, Tensor


class Backbone(nn.Module):
    """A vision tower with its projector, token embeddings, and the joint model.

    `image_scale` and `text_scale` multiply what enters the expert `vlm`. Raises ValueError when the
    joint model has no such expert.
    """

    def __init__(
        self,
        *,
        vision: VisionTower,
        joint: JointModel,
        vocab_size: int,
        vlm: str,
        image_scale: float,
        text_scale: float,
    ) -> None:
        super().__init__()
        if vlm not in joint.mixtures:
            raise ValueError(f"no mixture {vlm!r}{did_you_mean(vlm, joint.mixtures)}")
        width = joint.mixtures[vlm].width
        self.vision = vision
        self.projector = nn.Linear(vision.width, width)
        self.embedding = nn.Embedding(vocab_size, width)
        self.joint = joint
        self.vlm = vlm
        self.image_scale, self.text_scale = image_scale, text_scale

    def embed_sights_and_words(
        self, observation: Observation
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tokens of the segments "image" and "text", and which are real where not all are."""
        tokens = {
            "image": self._embed_images(observation.images),
            "text": self.embedding(observation.tokens) * self.text_scale,
        }
        valid: dict[str, Tensor] = {}
        if observation.image_mask is not None:
            valid["image"] = observation.image_mask.repeat_interleave(self.vision.num_tokens, dim=1)
        if observation.token_mask is not None:
            valid["text"] = observation.token_mask
        return tokens, valid

    def compile_blocks(self, **options) -> None:
        """Compile the repeated layers of every expert and of the vision tower, in place."""
        self.joint.compile_layers(**options)
        self.vision.compile_layers(**options)

    def cast(self, dtype: torch.dtype) -> Self:
        """Hold the bulk of the weights in `dtype`, in place, as published inference does.

        The experts' norms, the patch convolution, position embeddings and the layers of state,
        action and time stay float32: they are small, and the flow is integrated through them.
        """
        wide = {self.vision: ("patch_embedding", "position_embedding"), self.joint: ("norm",)}
        for module in (self.vision, self.projector, self.embedding, self.joint):
            for name, parameter in module.named_parameters():
                if not any(part in name for part in wide.get(module, ())):
                    parameter.data = parameter.data.to(dtype)
        return self

    def _embed_images(self, images: Tensor) -> Float[Tensor, "b s width"]:
        images = floats_of(images)
        b, n = images.shape[:2]
        x = self.vision(rearrange(images, "b n c h w -> (b n) c h w"))
        x = self.projector(x.to(self.projector.weight.dtype)) * self.image_scale
        return rearrange(x, "(b n) s d -> b (n s) d", b=b, n=n)


def floats_of(images: Tensor) -> Tensor:
    """uint8 levels as floats in [-1, 1]; floats as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def join_valid(
    valid: Mapping[str, Tensor], layout: TokenLayout, like: Tensor
) -> Bool[Tensor, "b s"] | None:
    """Which tokens of a layout are real, from those of some segments; None when all are."""
    if not valid:
        return None
    rows, device = like.shape[0], like.device
    ones = [
        valid.get(s.name, torch.ones(rows, s.length, dtype=torch.bool, device=device))
        for s in layout.segments
    ]
    return torch.cat(ones, dim=1)
