"""How well a model predicts held-out frames: flow loss, action error, accuracy.

Noise and flow times are fixed by the frames' numbers, so two validations differ by the weights
only. Every rank takes its share of the batches; sums are reduced, so the number of ranks does not
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from pizero.agent.training.distributed import Ranks
from pizero.agent.training.noise import flow_draws
from pizero.agent.training.tracking import Example
from pizero.data.pipeline import PolicyPipeline
from pizero.model import PiZero
from pizero.types import Batch

NUM_EXAMPLES = 4


@torch.no_grad()
def validate(
    model: PiZero,
    pipeline: PolicyPipeline,
    batches: Iterable[Batch],
    *,
    ranks: Ranks,
    seed: int,
    flow_samples: int,
    euler_steps: int,
    thresholds: Sequence[float],
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[dict[str, float], list[Example]]:
    """Metrics by name, and a few examples (of this rank's frames).

    `loss` is the training loss. `action_l1` is the mean error of sampled chunks in normalised
    units, `robot_l1/i` that of action dimension i in the robot's own. `accuracy_x` is the share of
    actions all of whose dimensions are within x, normalised. Padding counts nowhere.
    """
    model.eval()
    sums = _Sums(thresholds)
    examples: list[Example] = []
    for batch in batches:
        noise, times = flow_draws(
            batch.sample,
            seed=seed,
            flow_samples=flow_samples,
            horizon=model.horizon,
            action_dim=model.action_dim,
            time_sampler=model.time_sampler,
        )
        on_device = batch.to(ranks.device)
        noise, times = noise.to(ranks.device), times.to(ranks.device)
        with autocast():
            losses = model(on_device.observation, on_device.actions, noise, times)
            sampled = model.sample(on_device.observation, noise[:, 0], euler_steps)
        sums.add(batch, losses.float().cpu(), sampled.float().cpu())
        predicted = _robot_units(pipeline, sampled)
        recorded = _robot_units(pipeline, batch.actions)
        sums.add_robot(batch, predicted, recorded)
        for i in range(min(len(predicted), NUM_EXAMPLES - len(examples))):
            images = batch.observation.images[i].numpy()
            examples.append(Example(images=images, predicted=predicted[i], recorded=recorded[i]))
    model.train()
    return sums.metrics(ranks), examples


class _Sums:
    """Sums over entries and steps that are not padding, in float64."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = thresholds
        self.loss = torch.zeros(2, dtype=torch.float64)
        self.l1 = torch.zeros(2, dtype=torch.float64)
        self.within = torch.zeros(1 + len(thresholds), dtype=torch.float64)
        self.robot: torch.Tensor | None = None

    def add(self, batch: Batch, losses: torch.Tensor, sampled: torch.Tensor) -> None:
        mask = batch.action_mask
        counted = mask[:, None].expand_as(losses)
        self.loss += torch.stack([losses[counted].double().sum(), counted.sum().double()])
        error = (sampled - batch.actions).abs().masked_fill(~mask, 0.0)
        self.l1 += torch.stack([error.double().sum(), mask.sum().double()])
        steps = mask.any(-1)
        worst = error.amax(-1)[steps]
        hits = [(worst <= limit).sum() for limit in self.thresholds]
        self.within += torch.stack([steps.sum(), *hits]).double()

    def add_robot(self, batch: Batch, predicted: np.ndarray, recorded: np.ndarray) -> None:
        steps = batch.action_mask.any(-1)
        error = torch.from_numpy(np.abs(predicted - recorded)).double()[steps].sum(0)
        summed = torch.cat([steps.sum().double()[None], error])
        self.robot = summed if self.robot is None else self.robot + summed

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        assert self.robot is not None, "a rank without validation frames"
        parts = [self.loss, self.l1, self.within, self.robot]
        total = ranks.sum(torch.cat(parts).to(ranks.device)).cpu()
        loss, l1, within, robot = total.split([len(p) for p in parts])
        found = {"loss": loss[0] / loss[1], "action_l1": l1[0] / l1[1]}
        for limit, hits in zip(self.thresholds, within[1:], strict=True):
            found[f"accuracy_{limit:g}"] = hits / within[0]
        for i, error in enumerate(robot[1:]):
            found[f"robot_l1/{i}"] = error / robot[0]
        return {name: value.item() for name, value in found.items()}


def _robot_units(pipeline: PolicyPipeline, actions: torch.Tensor) -> np.ndarray:
    """Chunks [b horizon dim] in the robot's units; relative to the state where they are learned so.

    (A state of zeros adds nothing to both sides of a comparison.)
    """
    state = None
    if pipeline.delta_mask is not None:
        width = len(pipeline.delta_mask) if pipeline.robot is None else pipeline.robot.state_dim
        state = np.zeros((len(actions), width), np.float32)
    return pipeline.decode_actions(actions, state, live=False)
