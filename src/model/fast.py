"""pi0-FAST: a PaliGemma whose answer is the action chunk, spelt in tokens (Pertsch et al. 2025).

The tokens are data's business (`pizero.data.fast_tokenizer`): for the model they are words.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from pizero.model.joint import JointModel
from pizero.model.paligemma import Generated, PaliGemma
from pizero.model.positions import PositionRule
from pizero.model.vision import VisionTower
from pizero.types import Float, Observation, Tensor


class PiZeroFast(PaliGemma):
    """A policy that writes its actions as text.

    In training `observation.tokens` holds prompt and answer, `token_causal` marks the answer and
    `token_loss` what is to be learnt; to act, the prompt alone. `horizon` and `action_dim` are the
    chunk's sizes, which whoever reads the answer needs. The rest is as in PaliGemma.
    """

    def __init__(
        self,
        *,
        vision: VisionTower,
        joint: JointModel,
        vocab_size: int,
        horizon: int,
        action_dim: int,
        positions: PositionRule,
        decode_positions: PositionRule,
        decode_gap: int,
        stop_together: bool,
        vlm: str = "vlm",
    ) -> None:
        super().__init__(
            vision=vision,
            joint=joint,
            vocab_size=vocab_size,
            positions=positions,
            decode_positions=decode_positions,
            decode_gap=decode_gap,
            stop_together=stop_together,
            vlm=vlm,
        )
        self.horizon, self.action_dim = horizon, action_dim

    def forward(self, observation: Observation) -> Float[Tensor, " b"]:
        """Each row's cross entropy, averaged over the tokens that are to be learnt."""
        if observation.token_causal is None or observation.token_loss is None:
            raise ValueError(
                "training pi0-FAST needs token_causal and token_loss in the observation: which "
                "text tokens are the answer, and which of them are to be learnt"
            )
        logits = self.predictions(observation)
        error = F.cross_entropy(
            logits.flatten(0, 1), observation.tokens[:, 1:].flatten(), reduction="none"
        ).unflatten(0, logits.shape[:2])
        learnt = observation.token_loss[:, 1:]
        return (error * learnt).sum(dim=1) / learnt.sum(dim=1).clamp(min=1)

    def predictions(self, observation: Observation) -> Float[Tensor, "b s vocab"]:
        """Logits of text tokens 1, 2, ... given those before; the last one is never fed."""
        return super().forward(_without_last(observation))

    def question(self, observation: Observation) -> Observation:
        """What is to be answered, of an observation that holds the answer too."""
        if observation.token_causal is None:
            return observation
        asked = ~observation.token_causal
        if observation.token_mask is not None:
            asked = asked & observation.token_mask
        tokens = observation.tokens.masked_fill(~asked, 0)
        return replace(
            observation, tokens=tokens, token_mask=asked, token_causal=None, token_loss=None
        )

    def decode(
        self,
        observation: Observation,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        keep_logits: bool = False,
    ) -> Generated:
        """The answer to a prompt, token by token: see `PaliGemma.generate`."""
        return self.generate(
            observation,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator,
            keep_logits=keep_logits,
        )


def _without_last(observation: Observation) -> Observation:
    mask, causal = observation.token_mask, observation.token_causal
    return replace(
        observation,
        tokens=observation.tokens[:, :-1],
        token_mask=None if mask is None else mask[:, :-1],
        token_causal=None if causal is None else causal[:, :-1],
        token_loss=None,
    )
