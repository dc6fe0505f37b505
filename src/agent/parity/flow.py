"""What a flow policy computes for a case, under the names that cases give it.

openpi counts flow time from action to noise, so its times are mirrored and its velocities negated;
open-pi-zero's embeddings are stored before its experts scale them. Nothing else differs.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import NamedTuple

import torch

from pizero.agent.parity.case import Case
from pizero.model import PiZero, PrefixCache
from pizero.types import Tensor


class Answer(NamedTuple):
    """A tensor of ours, and the places where it means something (all by default)."""

    ours: Tensor
    where: Tensor | None = None


class FlowAnswers:
    """Answers by name (without `out.`), computed when asked for, each part once."""

    def __init__(self, case: Case, model: PiZero) -> None:
        self.case, self.model = case, model
        self.observation = case.flow_observation(takes_state=model.state_dim is not None)
        self._reverse = model.time_embedding.reverse
        self._unscaled = case.family == "open_pi_zero"

    @torch.no_grad()
    def answer(self, name: str, stored: Tensor) -> Answer | None:
        """The counterpart of a stored tensor; None for a name that means nothing here.

        Raises ValueError for a name that means something, but nothing that this model has.
        """
        if match := re.fullmatch(r"(actions|actions_unclipped|trajectory)\.steps(\d+)", name):
            return Answer(self._sampled(match[1], int(match[2])))
        if match := re.fullmatch(r"cache_([kv])\.(?:([a-z_]+)\.)?(\d+)", name):
            return self.cached(self._kept, match[1], match[2], int(match[3]))
        if name == "vision_features" or name.startswith("vision_features."):
            return self._pictures(name.removeprefix("vision_features").removeprefix("."))
        if name == "loss":
            return Answer(_averaged(self._loss, stored))
        if name == "loss_mean":
            return Answer(self._loss.mean().reshape(stored.shape))
        if name == "velocity":
            return Answer(-self._velocity if self._reverse else self._velocity)
        simple = {
            "x_t": lambda: self._point,
            "time_embedding": lambda: self._time_embedding,
            "adarms_cond": lambda: self.model.action_encoder.condition(self._time_embedding),
            "action_embs": lambda: self._action_tokens,
            "proprio_embs": lambda: self._state_tokens,
            "state_embs": lambda: self._state_tokens,
            "suffix_embs": lambda: self._suffix,
            "prefix_mask": lambda: self._valid,
        }
        if name == "prefix_embs":
            tokens, _, _ = self._embedded
            embedded = torch.cat((tokens["image"], tokens["text"]), dim=1)
            return Answer(self._as_stored(embedded, self._vlm_width), self._valid)
        if name not in simple:
            return None
        ours = simple[name]()
        if ours is None:
            raise ValueError(f"this model has no {name}")
        return Answer(ours)

    def loss(self) -> Tensor:
        """The mean loss, for gradients."""
        io, time = self.case.io, self._time
        noise = io["in.noise"][:, None]
        return self.model(self.observation, io["in.actions"], noise, time[:, None]).mean()

    @torch.no_grad()
    def cached_from_stored(self, name: str) -> Answer | None:
        """A key or value from the stored prefix embeddings in place of our own, if there are any.

        A case that stores both lets each stage be judged by itself.
        """
        match = re.fullmatch(r"cache_([kv])\.(?:([a-z_]+)\.)?(\d+)", name)
        if match is None or "out.prefix_embs" not in self.case.io:
            return None
        return self.cached(self._kept_from_stored, match[1], match[2], int(match[3]))

    def cached(self, kept: PrefixCache, which: str, stream: str | None, layer: int) -> Answer:
        """Keys or values of a layer [b heads s d]: of pictures and words, or of the state."""
        layers = kept.keys if which == "k" else kept.values
        if layer >= len(layers):
            raise ValueError(f"this model has layers 0 to {len(layers) - 1}")
        x = layers[layer].transpose(1, 2)
        length = self._valid.shape[1]
        if stream in (None, "vlm"):
            where = self._valid[:, None].expand(-1, x.shape[1], -1)
            return Answer(x[:, :, :length], where)
        if stream in ("proprio", "state") and self.model.state_dim is not None:
            return Answer(x[:, :, length:])
        raise ValueError(f"this model caches the streams vlm and state, not {stream!r}")

    @cached_property
    def _time(self) -> Tensor:
        time = self.case.io["in.time"].double()
        return 1 - time if self._reverse else time

    @cached_property
    def _point(self) -> Tensor:
        io = self.case.io
        return self.model.flow.point(io["in.noise"], io["in.actions"], self._time)

    @cached_property
    def _embedded(self):
        return self.model.embed_prefix(self.observation)

    @cached_property
    def _valid(self) -> Tensor:
        """Which pictures' and words' tokens are real [b s]."""
        tokens, valid, _ = self._embedded
        length = tokens["image"].shape[1] + tokens["text"].shape[1]
        if valid is None:
            return torch.ones(tokens["text"].shape[0], length, dtype=torch.bool)
        return valid[:, :length]

    @cached_property
    def _kept(self) -> PrefixCache:
        return self.model.prefix(self.observation)

    @cached_property
    def _kept_from_stored(self) -> PrefixCache:
        tokens, valid, layout = self._embedded
        stored = self.case.io["out.prefix_embs"]
        if self._unscaled:
            stored = stored * self._vlm_width**0.5
        pictures = tokens["image"].shape[1]
        pieces = {"image": stored[:, :pictures], "text": stored[:, pictures:]}
        real = {"image": self._valid[:, :pictures], "text": self._valid[:, pictures:]}
        replaced = {
            name: torch.where(real[name][..., None], piece.to(tokens[name].dtype), tokens[name])
            for name, piece in pieces.items()
        }
        positions = self.model.positions(
            layout, valid=valid, past=None, past_valid=None, device=stored.device
        )
        return self.model.joint(
            {**tokens, **replaced}, layout, positions=positions, valid=valid, read=()
        )[1]

    @cached_property
    def _velocity(self) -> Tensor:
        return self.model.velocity(self._kept, self._point, self._time)

    @cached_property
    def _loss(self) -> Tensor:
        io = self.case.io
        noise = io["in.noise"][:, None]
        return self.model(self.observation, io["in.actions"], noise, self._time[:, None])[:, 0]

    def _sampled(self, what: str, steps: int) -> Tensor:
        noise = self.case.io["in.noise"]
        if what == "actions":
            return self.model.sample(self.observation, noise, steps)
        path = self.model.trajectory(self.observation, noise, steps)
        return torch.stack(path) if what == "trajectory" else path[-1]

    def _pictures(self, camera: str) -> Answer:
        images = self.observation.images
        names = self.case.cameras
        if camera:
            if camera not in names:
                raise ValueError(f"no camera {camera!r}; the case has {list(names)}")
            return Answer(self.model.vision(images[:, names.index(camera)]))
        features = [self.model.vision(images[:, i]) for i in range(images.shape[1])]
        return Answer(torch.cat(features, dim=1))

    @property
    def _vlm_width(self) -> int:
        return self.model.joint.mixtures[self.model.vlm].width

    @property
    def _action_width(self) -> int:
        return self.model.joint.mixtures[self.model.action].width

    def _as_stored(self, scaled: Tensor, width: int) -> Tensor:
        return scaled / width**0.5 if self._unscaled else scaled

    @cached_property
    def _time_embedding(self) -> Tensor:
        return self.model.time_embedding(self._time, self._action_width)

    @property
    def _action_tokens(self) -> Tensor:
        encoder = self.model.action_encoder
        return encoder(self._point, encoder.token_term(self._time_embedding))

    @property
    def _state_tokens(self) -> Tensor | None:
        if "state" not in self._embedded[0]:
            return None
        return self._as_stored(self._embedded[0]["state"], self._action_width)

    @property
    def _suffix(self) -> Tensor:
        state, actions = self._state_tokens, self._action_tokens
        return actions if state is None else torch.cat((state, actions), dim=1)


def _averaged(loss: Tensor, stored: Tensor) -> Tensor:
    """The loss over as many axes as the stored one has: JAX's openpi averages action dimensions."""
    while loss.ndim > stored.ndim:
        loss = loss.mean(dim=-1)
    return loss
