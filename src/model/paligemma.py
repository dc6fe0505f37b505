"""Pictures and words in, words out: PaliGemma, with one expert and a head tied to the embedding.

What is given (pictures and a prompt) is seen whole; what follows is causal. Generation runs what is
given once, then a token at a time into buffers whose shapes never change.

Axes: b batch, s text tokens, n generated tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pizero.model.backbone import Backbone, join_valid
from pizero.model.cache import PrefixCache, RoomyCache
from pizero.model.initialise import initialise
from pizero.model.joint import JointModel
from pizero.model.layout import Segment, TokenLayout
from pizero.model.positions import PositionRule
from pizero.model.vision import VisionTower
from pizero.types import Bool, Float, Int, Observation, Tensor

EOS = 1  # Gemma's token for the end of a text
LOOK_EVERY = 8  # steps between looks at whether all rows have ended: a look makes the host wait


class Generated(NamedTuple):
    """Tokens that follow a prompt, 0 behind the end of a row.

    `lengths` counts each row's tokens, its end included; `ended` is False where the limit came
    first. `logits` are those that each token was taken from, up to the last step any row needed;
    None unless asked for.
    """

    tokens: Int[Tensor, "b n"]
    lengths: Int[Tensor, " b"]
    ended: Bool[Tensor, " b"]
    logits: Float[Tensor, "b _ vocab"] | None


class PaliGemma(Backbone):
    """A vision-language model that speaks.

    Positions of what is given follow `positions` where logits of whole texts are made, and
    `decode_positions` where text is generated; generated tokens continue those, `decode_gap`
    further on. Rows end at their own end token or, with `stop_together`, all at the step at which
    every row gives one. Published families differ here.

    Raises ValueError when the expert has no output to read.
    """

    def __init__(
        self,
        *,
        vision: VisionTower,
        joint: JointModel,
        vocab_size: int,
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
            vlm=vlm,
            image_scale=1.0,
            text_scale=joint.mixtures[vlm].width ** 0.5 if vlm in joint.mixtures else 1.0,
        )
        if joint.mixtures[vlm].kv_only_tail:
            raise ValueError(
                f"expert {vlm!r} was built with kv_only_tail, so nothing can be read from it: a "
                "model that speaks needs kv_only_tail: false"
            )
        self.positions, self.decode_positions = positions, decode_positions
        self.decode_gap, self.stop_together = decode_gap, stop_together
        initialise(self)

    def forward(self, observation: Observation) -> Float[Tensor, "b s vocab"]:
        """Logits, at every text token, of the token after it."""
        return self.head(self._run(observation, self.positions)[0])

    @torch.no_grad()
    def generate(
        self,
        observation: Observation,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        keep_logits: bool = False,
    ) -> Generated:
        """Continue each row's text: the likeliest token each time, or with a `temperature` a draw.

        Every row needs a text token; padding may stand on either side. `generator` is a CPU
        generator, of which each token takes one number, so draws do not depend on the device.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        logits, position, cache = self.prefill(observation, room=max_new_tokens)
        device, rows = logits.device, logits.shape[0]
        slot = torch.full((1,), cache.valid.shape[1] - max_new_tokens, device=device)
        luck = None
        if temperature > 0:
            luck = torch.rand(rows, max_new_tokens, generator=generator).to(device)
        tokens, kept = [], []
        for i in range(max_new_tokens):
            tokens.append(_pick(logits, temperature, None if luck is None else luck[:, i]))
            kept += [logits] if keep_logits else []
            if len(tokens) == max_new_tokens:
                break
            if len(tokens) % LOOK_EVERY == 0 and self._ends(tokens).any(dim=1).all():
                break
            logits = self.step(tokens[-1], cache, slot=slot, position=position)
            slot, position = slot + 1, position + 1
        ends = self._ends(tokens).long()
        counts = ends.cumsum(dim=1) - ends == 0
        given = torch.where(counts, torch.stack(tokens, dim=1), 0)
        lengths = counts.sum(dim=1)
        return Generated(
            tokens=F.pad(given, (0, max_new_tokens - given.shape[1])),
            lengths=lengths,
            ended=ends.any(dim=1),
            logits=torch.stack(kept[: int(lengths.max())], dim=1) if keep_logits else None,
        )

    def prefill(
        self, observation: Observation, *, room: int
    ) -> tuple[Float[Tensor, "b vocab"], Int[Tensor, "b 1"], RoomyCache]:
        """Run what is given: logits of the first new token, its position, a cache with room."""
        text, cache = self._run(observation, self.decode_positions)
        rows, length = observation.tokens.shape
        device = observation.tokens.device
        last = torch.full((rows,), length - 1, device=device)
        if observation.token_mask is not None:
            last = torch.where(observation.token_mask, torch.arange(length, device=device), 0)
            last = last.amax(dim=1)
        hidden = text[torch.arange(rows, device=device), last]
        following = TokenLayout(Segment("following", 1, 1, self.vlm))
        position = self.decode_positions(
            following, valid=None, past=cache.layout, past_valid=cache.valid, device=device
        )
        position = position.expand(rows, 1) + self.decode_gap
        return self.head(hidden), position, cache.with_room(room)

    def step(
        self,
        token: Int[Tensor, " b"],
        cache: RoomyCache,
        *,
        slot: Int[Tensor, " 1"],
        position: Int[Tensor, "b 1"],
    ) -> Float[Tensor, "b vocab"]:
        """Logits of the token after `token`, which the cache keeps at `slot`. One fixed shape."""
        x = self.embedding(token)[:, None] * self.text_scale
        return self.head(self.joint.step(self.vlm, x, cache, slot=slot, positions=position)[:, 0])

    def embed(
        self, observation: Observation
    ) -> tuple[dict[str, Tensor], Bool[Tensor, "b s"] | None, TokenLayout]:
        """Tokens of pictures and text, which of them are real (None: all), and their layout."""
        tokens, valid = self.embed_sights_and_words(observation)
        layout = TokenLayout(
            Segment("image", tokens["image"].shape[1], 0, self.vlm),
            Segment("text", tokens["text"].shape[1], 0, self.vlm, causal=bool(_opens(observation))),
        )
        return tokens, join_valid(valid, layout, observation.tokens), layout

    def head(self, hidden: Float[Tensor, "*b width"]) -> Float[Tensor, "*b vocab"]:
        """Logits of the whole vocabulary, in at least float32."""
        weight = self.embedding.weight
        logits = F.linear(hidden.to(weight.dtype), weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable weights: "vision" (with the projector), and the expert with the embedding."""
        modules = {
            "vision": [self.vision, self.projector],
            self.vlm: [self.joint.mixtures[self.vlm], self.embedding],
        }
        groups = {
            name: [p for m in members for p in m.parameters() if p.requires_grad]
            for name, members in modules.items()
        }
        return {name: group for name, group in groups.items() if group}

    def _run(
        self, observation: Observation, rule: PositionRule
    ) -> tuple[Float[Tensor, "b s width"], PrefixCache]:
        """The expert's output at the text, and its keys and values of everything."""
        tokens, valid, layout = self.embed(observation)
        device = observation.tokens.device
        positions = rule(layout, valid=valid, past=None, past_valid=None, device=device)
        out, cache = self.joint(
            tokens,
            layout,
            positions=positions,
            valid=valid,
            read=("text",),
            opens=_opens(observation),
        )
        return out["text"], cache

    def _ends(self, tokens: list[Tensor]) -> Bool[Tensor, "b n"]:
        """Where rows end."""
        ends = torch.stack(tokens, dim=1) == EOS
        return ends.all(dim=0).expand_as(ends) if self.stop_together else ends


def _opens(observation: Observation) -> dict[str, Tensor]:
    causal = observation.token_causal
    return {} if causal is None else {"text": causal}


def _pick(
    logits: Float[Tensor, "b vocab"], temperature: float, luck: Float[Tensor, " b"] | None
) -> Int[Tensor, " b"]:
    """The likeliest token, or where `luck` in [0, 1) falls among the chances at a temperature."""
    if luck is None:
        return logits.argmax(dim=-1)
    reached = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(reached, luck.double()[:, None] * reached[:, -1:], right=True)
    return drawn[:, 0].clamp(max=logits.shape[-1] - 1)
