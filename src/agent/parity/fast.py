"""What pi0-FAST computes for a case, under the names that cases give it."""

from __future__ import annotations

import re
from functools import cached_property

import torch

from pizero.agent.parity.case import Case
from pizero.agent.parity.flow import Answer
from pizero.model import PiZeroFast
from pizero.model.paligemma import Generated
from pizero.types import Observation, Tensor


class FastAnswers:
    """Answers by name (without `out.`), computed when asked for, each part once."""

    def __init__(self, case: Case, model: PiZeroFast) -> None:
        self.case, self.model = case, model
        self._decoded: dict[tuple[int | None, int], Generated] = {}

    @torch.no_grad()
    def answer(self, name: str, stored: Tensor) -> Answer | None:
        """The counterpart of a stored tensor; None for a name that means nothing here."""
        if match := re.fullmatch(r"decode(?:_row(\d+))?\.(tokens|logits)", name):
            row = None if match[1] is None else int(match[1])
            decoded = self._decode(row, name.rsplit(".", 1)[0])
            return Answer(decoded.tokens if match[2] == "tokens" else _logits(decoded))
        if name == "logits":
            mask = self._observation.token_mask
            ours = self.model.predictions(self._observation)
            return Answer(ours, None if mask is None else mask[:, :-1])
        if name == "loss":
            return Answer(self._loss)
        if name == "loss_mean":
            return Answer(self._loss.mean().reshape(stored.shape))
        if name in ("input_embs", "prefix_embs"):
            tokens, valid, _ = self.model.embed(self._observation)
            return Answer(torch.cat((tokens["image"], tokens["text"]), dim=1), valid)
        return None

    def loss(self) -> Tensor:
        """The mean loss, for gradients."""
        return self.model(self._observation).mean()

    @cached_property
    def _loss(self) -> Tensor:
        return self.model(self._observation)

    @cached_property
    def _observation(self) -> Observation:
        return self._inputs("in.")

    def _inputs(self, prefix: str) -> Observation:
        io = self.case.io
        if f"{prefix}tokens" not in io:
            raise ValueError(f"{self.case.folder} has no {prefix}tokens")
        own = any(name.startswith(f"{prefix}image") for name in io)
        images, image_mask = self.case.images(prefix if own else "in.")
        return Observation(
            images=images,
            tokens=io[f"{prefix}tokens"],
            image_mask=image_mask,
            token_mask=self.case.mask(f"{prefix}token_mask"),
            token_causal=self.case.mask(f"{prefix}token_ar_mask"),
            token_loss=self.case.mask(f"{prefix}token_loss_mask"),
        )

    def _decode(self, row: int | None, name: str) -> Generated:
        """Greedy tokens for all rows, or for one of them alone."""
        stored = self.case.io.get(f"out.{name}.tokens")
        steps = self.case.facts.get("decode_steps") if stored is None else stored.shape[1]
        if steps is None:
            raise ValueError("case.json lacks decode_steps, the most tokens to decode")
        if (row, steps) not in self._decoded:
            inputs = self._inputs("in.decode.")
            chosen = slice(None) if row is None else slice(row, row + 1)
            mask = inputs.token_mask
            prompt = Observation(
                images=inputs.images[chosen],
                tokens=inputs.tokens[chosen],
                image_mask=None if inputs.image_mask is None else inputs.image_mask[chosen],
                token_mask=None if mask is None else mask[chosen],
            )
            self._decoded[row, steps] = self.model.decode(
                prompt, max_new_tokens=steps, keep_logits=True
            )
        return self._decoded[row, steps]


def _logits(decoded: Generated) -> Tensor:
    assert decoded.logits is not None
    return decoded.logits
