"""What a kind of policy is trained by: `loss_of` chooses once, the trainer asks no further.

A loss says what the model is given, which of its unreduced losses count and how many they are, so
that the trainer can take the mean over a global batch however it is split. For validation it also
says what the policy would do.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from pizero.agent.config import TrainConfig
from pizero.agent.training.noise import flow_draws
from pizero.data.fast_tokenizer import UndecodableActions
from pizero.data.pipeline import PolicyPipeline
from pizero.model import PiZero, PiZeroFast
from pizero.types import Batch, Bool, Float, Tensor


class Predicted(NamedTuple):
    """Normalised chunks on the CPU; a row that is not `readable` holds nothing."""

    actions: Float[Tensor, "b horizon action_dim"]
    readable: Bool[Tensor, " b"]


class Loss(Protocol):
    """The training loss of one kind of policy.

    speaks         whether answers may be unreadable
    num_predicted  held-out frames whose actions are predicted, as that may be slow; None: all
    """

    speaks: bool
    num_predicted: int | None

    def entries(self, batch: Batch) -> Tensor:
        """How many of a batch's losses count; an integer on the batch's device."""
        ...

    def inputs(self, batch: Batch, device: torch.device) -> tuple[Any, ...]:
        """The arguments of the model's forward, on `device`, for a batch on the CPU."""
        ...

    def counted(self, batch: Batch) -> Tensor:
        """Which of the model's losses count: bool, broadcasts to them."""
        ...

    def predict(self, inputs: tuple[Any, ...]) -> Predicted:
        """The chunks that the policy would answer to `inputs` with."""
        ...


class FlowLoss:
    """Squared error of the velocity at each entry of an action that is not padding.

    `samples` draws of noise and flow time of each row, which its number fixes.
    """

    speaks = False
    num_predicted: int | None = None

    def __init__(self, model: PiZero, *, seed: int, samples: int, euler_steps: int) -> None:
        self.model, self.seed, self.samples = model, seed, samples
        self.euler_steps = euler_steps

    def entries(self, batch: Batch) -> Tensor:
        return batch.action_mask.sum() * self.samples

    def inputs(self, batch: Batch, device: torch.device) -> tuple[Any, ...]:
        noise, times = flow_draws(
            batch.sample,
            seed=self.seed,
            flow_samples=self.samples,
            horizon=self.model.horizon,
            action_dim=self.model.action_dim,
            time_sampler=self.model.time_sampler,
        )
        if device.type == "cuda":
            # From pinned memory the copy does not wait for the device to finish the last step.
            noise, times = noise.pin_memory(), times.pin_memory()
        noise, times = noise.to(device, non_blocking=True), times.to(device, non_blocking=True)
        batch = batch.to(device)
        return batch.observation, batch.actions, noise, times

    def counted(self, batch: Batch) -> Bool[Tensor, "b 1 horizon action_dim"]:
        return batch.action_mask[:, None]

    def predict(self, inputs: tuple[Any, ...]) -> Predicted:
        observation, _, noise, _ = inputs
        actions = self.model.sample(observation, noise[:, 0], self.euler_steps)
        return Predicted(actions.float().cpu(), torch.ones(len(actions), dtype=torch.bool))


class AnswerLoss:
    """Cross entropy of the answer that spells a chunk: each row's mean over its tokens, rows alike.

    A row whose question left no room for an answer does not count.
    """

    speaks = True

    def __init__(self, model: PiZeroFast, pipeline: PolicyPipeline, *, num_predicted: int) -> None:
        self.model, self.pipeline = model, pipeline
        self.num_predicted: int | None = num_predicted

    def entries(self, batch: Batch) -> Tensor:
        return self.counted(batch).sum()

    def inputs(self, batch: Batch, device: torch.device) -> tuple[Any, ...]:
        return (batch.observation.to(device),)

    def counted(self, batch: Batch) -> Bool[Tensor, " b"]:
        learnt = batch.observation.token_loss
        assert learnt is not None, "a pipeline that writes answers marks them"
        return learnt[:, 1:].any(dim=1)

    def predict(self, inputs: tuple[Any, ...]) -> Predicted:
        (observation,) = inputs
        question = self.model.question(observation)
        # No longer answer was ever learnt.
        said = self.model.decode(question, max_new_tokens=self.pipeline.max_tokens).tokens.cpu()
        actions = np.zeros((len(said), self.model.horizon, self.model.action_dim), np.float32)
        readable = torch.zeros(len(said), dtype=torch.bool)
        for i, tokens in enumerate(said):
            try:
                actions[i] = self.pipeline.read_answer(tokens)
                readable[i] = True
            except UndecodableActions:
                continue
        return Predicted(torch.from_numpy(actions), readable)


def loss_of(model: nn.Module, pipeline: PolicyPipeline, config: TrainConfig) -> Loss:
    """The loss that a model is trained by. Raises ValueError where the pipeline is another's."""
    if not isinstance(model, PiZero | PiZeroFast):
        raise ValueError(f"expected a PiZero or PiZeroFast to train, got {type(model).__name__}")
    if isinstance(model, PiZeroFast) != (pipeline.fast is not None):
        # A flow policy would find the actions it is to predict among its words.
        raise ValueError(
            f"the prompt 'fast' is for PiZeroFast, which needs it: got {type(model).__name__} and "
            f"pipeline.prompt={pipeline.prompt!r}"
        )
    if isinstance(model, PiZeroFast):
        return AnswerLoss(model, pipeline, num_predicted=config.validate.answers)
    return FlowLoss(
        model,
        seed=config.seed,
        samples=config.flow_samples,
        euler_steps=config.validate.euler_steps,
    )
