"""The policy: pictures, words and state in; a chunk of actions out, by flow matching.

What the flow time does not touch (pictures, words, state, any stream a user adds) is the prefix:
run once for an observation, kept as keys and values. The suffix is the action chunk, run once for
each flow sample in training and once for each Euler step in sampling.

Axes: b batch, k flow samples of one observation, n cameras, h horizon, a action_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pizero.model.backbone import Backbone, join_valid
from pizero.model.cache import PrefixCache
from pizero.model.containers import Named
from pizero.model.embed import AdaptiveActionEncoder, MixedActionEncoder, SinusoidalTime
from pizero.model.flow import FlowPath, TimeSampler, euler_times
from pizero.model.initialise import initialise
from pizero.model.joint import JointModel
from pizero.model.layout import Segment, TokenLayout, did_you_mean
from pizero.model.mixture import Mixture, MixtureModulation
from pizero.model.positions import PositionRule
from pizero.model.vision import VisionTower
from pizero.types import Bool, Float, Observation, Tensor


@dataclass(frozen=True)
class Scales:
    """Each stream enters its expert times the expert's width to this power: 0 as it is, 0.5 as
    Gemma scales its embeddings. Published families differ here."""

    image: float
    text: float
    state: float
    action: float


class Stream(nn.Module):
    """A further input with an expert of its own (or a shared one): touch, force, a goal picture...

    `observation.extras[name]` [b s dim] goes through `encoder` to [b s width of the expert].
    """

    def __init__(self, *, expert: str, block: int, encoder: nn.Module) -> None:
        super().__init__()
        self.expert, self.block, self.encoder = expert, block, encoder


class PiZero(Backbone):
    """A pi0-family policy over any set of experts.

    `state_dim` gives the state a token in the action expert (pi0); None leaves it to the prompt
    (pi0.5). The action expert's norms decide how the flow time enters: adaptive norms (`cond_dim`
    of its mixture) as in pi0.5, otherwise mixed into the tokens as in pi0. `streams` adds inputs.
    """

    def __init__(
        self,
        *,
        vision: VisionTower,
        joint: JointModel,
        vocab_size: int,
        horizon: int,
        action_dim: int,
        state_dim: int | None,
        time_embedding: SinusoidalTime,
        time_sampler: TimeSampler,
        flow: FlowPath,
        positions: PositionRule,
        scales: Scales,
        streams: Mapping[str, Stream] | None = None,
        stop_grad: Iterable[Sequence[str]] = (),
        action_clip: float | None = None,
        vlm: str = "vlm",
        action: str = "action",
    ) -> None:
        prefix = {"image": vlm, "text": vlm, **{n: s.expert for n, s in (streams or {}).items()}}
        if state_dim is not None:
            prefix["state"] = action
        _check_experts(dict(joint.mixtures.items()), prefix, action)
        edges = tuple((q, k) for q, k in stop_grad)
        _check_edges(edges, (*prefix, "action"))
        vlm_width, action_width = joint.mixtures[vlm].width, joint.mixtures[action].width
        adaptive = joint.mixtures[action].cond_dim is not None
        super().__init__(
            vision=vision,
            joint=joint,
            vocab_size=vocab_size,
            vlm=vlm,
            image_scale=vlm_width**scales.image,
            text_scale=vlm_width**scales.text,
        )
        self.stop_grad = edges
        self.streams = Named[Stream](dict(streams or {}))
        self.state_encoder = None if state_dim is None else nn.Linear(state_dim, action_width)
        self.time_embedding = time_embedding
        encoder = AdaptiveActionEncoder if adaptive else MixedActionEncoder
        self.action_encoder = encoder(action_dim=action_dim, width=action_width)
        self.action_decoder = nn.Linear(action_width, action_dim)
        self.horizon, self.action_dim, self.state_dim = horizon, action_dim, state_dim
        self.time_sampler, self.flow, self.positions = time_sampler, flow, positions
        self.state_scale = action_width**scales.state
        self.action_scale = action_width**scales.action
        self.action_clip = action_clip
        self.action = action
        initialise(self)
        self._freeze_unread()

    def forward(
        self,
        observation: Observation,
        actions: Float[Tensor, "b h a"],
        noise: Float[Tensor, "b k h a"],
        time: Float[Tensor, "b k"],
    ) -> Float[Tensor, "b k h a"]:
        """The squared error of the velocity, unreduced, for k flow samples of each observation.

        The prefix runs once, whatever k is: pi0's equation 1 with k draws in place of one.
        """
        cache = self.prefix(observation)
        samples = noise.shape[1]
        actions = actions[:, None].float()
        point = self.flow.point(noise.float(), actions, time)
        velocity = self.velocity(cache.repeat(samples), point.flatten(0, 1), time.flatten())
        target = self.flow.velocity(noise.float(), actions)
        return (velocity.unflatten(0, (-1, samples)) - target).square()

    def prefix(self, observation: Observation) -> PrefixCache:
        """Keys and values of everything the flow time does not touch; one vision call."""
        tokens, valid, layout = self.embed_prefix(observation)
        positions = self.positions(
            layout, valid=valid, past=None, past_valid=None, device=observation.tokens.device
        )
        return self.joint(tokens, layout, positions=positions, valid=valid, read=())[1]

    def velocity(
        self, cache: PrefixCache, point: Float[Tensor, "b h a"], time: Float[Tensor, " b"]
    ) -> Float[Tensor, "b h a"]:
        """The velocity at `point` and flow time `time`, given the prefix."""
        term, modulation = self._time_tables(time)
        return self._velocity(cache, point, term, modulation)

    def sample(
        self, observation: Observation, noise: Float[Tensor, "b h a"], num_steps: int
    ) -> Float[Tensor, "b h a"]:
        """Integrate from noise to actions in `num_steps` equal Euler steps."""
        actions = self.trajectory(observation, noise, num_steps)[-1]
        return (
            actions
            if self.action_clip is None
            else actions.clamp(-self.action_clip, self.action_clip)
        )

    def trajectory(
        self, observation: Observation, noise: Float[Tensor, "b h a"], num_steps: int
    ) -> list[Float[Tensor, "b h a"]]:
        """The noise and what each Euler step makes of it, unclipped: num_steps + 1 chunks."""
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        cache = self.prefix(observation)
        terms, modulation = self._time_tables(euler_times(num_steps, noise.device))
        points = [noise.float()]
        for i in range(num_steps):
            term = None if terms is None else terms[i : i + 1]
            at_step = {name: m.step(i) for name, m in modulation.items()}
            points.append(points[-1] + self._velocity(cache, points[-1], term, at_step) / num_steps)
        return points

    def embed_prefix(
        self, observation: Observation
    ) -> tuple[dict[str, Tensor], Bool[Tensor, "b s"] | None, TokenLayout]:
        """Tokens of every prefix segment, which of them are real (None: all), and their layout."""
        tokens, valid = self.embed_sights_and_words(observation)
        for name, stream in self.streams.items():
            if name not in observation.extras:
                hint = did_you_mean(name, observation.extras)
                raise ValueError(f"the observation lacks the stream {name!r}{hint}")
            tokens[name] = stream.encoder(observation.extras[name])
        if self.state_encoder is not None:
            tokens["state"] = self._embed_state(self.state_encoder, observation.state)
        layout = self.prefix_layout({name: x.shape[1] for name, x in tokens.items()})
        return tokens, join_valid(valid, layout, observation.tokens), layout

    def prefix_layout(self, lengths: Mapping[str, int]) -> TokenLayout:
        """Pictures and words, the user's streams, the state: in order of their blocks."""
        segments = [Segment("image", lengths["image"], 0, self.vlm)]
        segments += [Segment("text", lengths["text"], 0, self.vlm)]
        segments += [Segment(n, lengths[n], s.block, s.expert) for n, s in self.streams.items()]
        if self.state_encoder is not None:
            segments += [Segment("state", lengths["state"], 1, self.action)]
        return TokenLayout(*sorted(segments, key=lambda s: s.block), stop_grad=self.stop_grad)

    def suffix_layout(self) -> TokenLayout:
        """The action chunk, which sees everything."""
        block = 1 + max([1, *(s.block for s in self.streams.values())])
        return TokenLayout(
            Segment("action", self.horizon, block, self.action), stop_grad=self.stop_grad
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable weights by expert: "vision" (with the projector), then each mixture with what
        feeds it."""
        modules: dict[str, list[nn.Module]] = {"vision": [self.vision, self.projector]}
        for name, mixture in self.joint.mixtures.items():
            modules.setdefault(name, []).append(mixture)
        modules[self.vlm] += [self.embedding]
        modules[self.action] += [self.action_encoder, self.action_decoder]
        if self.state_encoder is not None:
            modules[self.action] += [self.state_encoder]
        for stream in self.streams.values():
            modules[stream.expert] += [stream.encoder]
        groups = {
            name: [p for m in members for p in m.parameters() if p.requires_grad]
            for name, members in modules.items()
        }
        return {name: group for name, group in groups.items() if group}

    def _velocity(
        self,
        cache: PrefixCache,
        point: Tensor,
        term: Tensor | None,
        modulation: Mapping[str, MixtureModulation],
    ) -> Tensor:
        layout = self.suffix_layout()
        positions = self.positions(
            layout, valid=None, past=cache.layout, past_valid=cache.valid, device=point.device
        )
        tokens = {"action": self.action_encoder(point, term) * self.action_scale}
        out, _ = self.joint(tokens, layout, positions=positions, modulation=modulation, cache=cache)
        return self.action_decoder(out["action"].to(self.action_decoder.weight.dtype)).float()

    def _time_tables(
        self, time: Float[Tensor, " rows"]
    ) -> tuple[Tensor | None, dict[str, MixtureModulation]]:
        """Everything that depends on the flow time alone, a row for each time."""
        mixture = self.joint.mixtures[self.action]
        embedded = self.time_embedding(time, mixture.width)
        cond = self.action_encoder.condition(embedded)
        modulation = {} if cond is None else {self.action: mixture.modulate(cond)}
        return self.action_encoder.token_term(embedded), modulation

    def _embed_state(
        self, encoder: nn.Linear, state: Tensor | None
    ) -> Float[Tensor, "b frames width"]:
        if state is None or state.shape[-1] != self.state_dim:
            got = None if state is None else tuple(state.shape)
            raise ValueError(f"the model expects a state [b frames {self.state_dim}], got {got}")
        return encoder(state.to(encoder.weight.dtype)) * self.state_scale

    def _freeze_unread(self) -> None:
        """Weights whose result nobody reads get no gradient; say so to the optimiser and to DDP."""
        for name, mixture in self.joint.mixtures.items():
            if name != self.action:
                for parameter in mixture.unread_parameters():
                    parameter.requires_grad_(False)


def _check_experts(mixtures: Mapping[str, Mixture], prefix: Mapping[str, str], action: str) -> None:
    """Each part of the prefix has an expert, and the flow time reaches the action expert alone."""
    for name in (*prefix.values(), action):
        if name not in mixtures:
            raise ValueError(f"no mixture {name!r}{did_you_mean(name, mixtures)}")
    width, cond_dim = mixtures[action].width, mixtures[action].cond_dim
    if width % 2:
        raise ValueError(f"expert {action!r} needs an even width to embed time, got {width}")
    if cond_dim not in (None, width):
        raise ValueError(
            f"expert {action!r} has cond_dim {cond_dim}, but the flow time is embedded in its "
            f"width, {width}"
        )
    for name, mixture in mixtures.items():
        if name != action and mixture.cond_dim is not None:
            raise ValueError(
                f"expert {name!r} has adaptive norms (cond_dim {mixture.cond_dim}), but the flow "
                f"time reaches {action!r} alone: leave its cond_dim null"
            )
    shared = [name for name, expert in prefix.items() if expert == action]
    if cond_dim is not None and shared:
        raise ValueError(
            f"expert {action!r} has adaptive norms, which would make its {shared[0]} depend on the "
            "flow time: give that an expert of its own, or (the state) leave state_dim null and "
            "put the state in the prompt"
        )


def _check_edges(stop_grad: Iterable[tuple[str, str]], segments: Sequence[str]) -> None:
    """Edges name segments that exist: a misspelt one would stop nothing."""
    for edge in stop_grad:
        for name in edge:
            if name not in segments:
                hint = did_you_mean(name, segments)
                raise ValueError(f"stop_grad edge {list(edge)} names no segment: {name!r}{hint}")
