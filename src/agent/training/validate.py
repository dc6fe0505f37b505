"""How well a model predicts held-out frames: loss, action error, accuracy, answers that are none.

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
from pizero.agent.training.losses import Loss, Predicted
from pizero.agent.training.tracking import Example
from pizero.data.pipeline import PolicyPipeline
from pizero.model import PiZero, PiZeroFast
from pizero.types import Batch

NUM_EXAMPLES = 4


@torch.no_grad()
def validate(
    model: PiZero | PiZeroFast,
    loss: Loss,
    pipeline: PolicyPipeline | None,
    batches: Iterable[Batch],
    *,
    ranks: Ranks,
    thresholds: Sequence[float],
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[dict[str, float], list[Example]]:
    """Metrics by name, and a few examples (of this rank's frames).

    `loss` is the training loss. `action_l1` is the mean error of predicted chunks in normalised
    units, `robot_l1/i` that of action dimension i in the robot's own. `accuracy_x` is the share of
    actions all of whose dimensions are within x, normalised. Padding counts nowhere. Without a
    pipeline, as where robots differ, there is nothing in robot units.

    `undecodable` is the share of answers that spell no chunk, where chunks are spelt. They are no
    part of the errors, which are left out where there is no other answer, and accurate nowhere.
    """
    model.eval()
    sums = _Sums(thresholds)
    examples: list[Example] = []
    frames = 0
    for batch in batches:
        inputs = loss.inputs(batch, ranks.device)
        predicts = loss.num_predicted is None or frames < loss.num_predicted
        frames += len(batch.sample) * ranks.world_size
        with autocast():
            losses = model(*inputs)
            found = loss.predict(inputs) if predicts else None
        sums.add_losses(losses.float().cpu(), loss.counted(batch))
        if found is None:
            continue
        predicted, recorded = found.actions.numpy(), batch.actions.numpy()
        if pipeline is not None:
            predicted = _robot_units(pipeline, found.actions)
            recorded = _robot_units(pipeline, batch.actions)
            sums.add_robot(batch, found, np.abs(predicted - recorded))
        sums.add(batch, found)
        for i in found.readable.nonzero()[: NUM_EXAMPLES - len(examples), 0].tolist():
            images = batch.observation.images[i].numpy()
            examples.append(Example(images=images, predicted=predicted[i], recorded=recorded[i]))
    model.train()
    metrics = sums.metrics(ranks)
    if not loss.speaks:
        del metrics["undecodable"]
    return metrics, examples


class _Sums:
    """Sums over entries and steps that are not padding, in float64."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = thresholds
        self.loss = torch.zeros(2, dtype=torch.float64)
        self.l1 = torch.zeros(2, dtype=torch.float64)
        self.within = torch.zeros(1 + len(thresholds), dtype=torch.float64)
        self.unread = torch.zeros(2, dtype=torch.float64)
        self.robot: torch.Tensor | None = None

    def add_losses(self, losses: torch.Tensor, counted: torch.Tensor) -> None:
        counted = counted.expand_as(losses)
        self.loss += torch.stack([losses[counted].double().sum(), counted.sum().double()])

    def add(self, batch: Batch, found: Predicted) -> None:
        read = found.readable[:, None]
        mask = batch.action_mask & read[..., None]
        error = (found.actions - batch.actions).abs().masked_fill(~mask, 0.0)
        self.l1 += torch.stack([error.double().sum(), mask.sum().double()])
        steps = batch.action_mask.any(-1)
        worst = error.amax(-1).masked_fill(~read, float("inf"))[steps]
        hits = [(worst <= limit).sum() for limit in self.thresholds]
        self.within += torch.stack([steps.sum(), *hits]).double()
        unread = (~found.readable).sum()
        self.unread += torch.stack([unread, torch.tensor(len(read))]).double()

    def add_robot(self, batch: Batch, found: Predicted, robot_error: np.ndarray) -> None:
        steps = (batch.action_mask & found.readable[:, None, None]).any(-1)
        summed = torch.from_numpy(robot_error).double()[steps].sum(0)
        summed = torch.cat([steps.sum().double()[None], summed])
        self.robot = summed if self.robot is None else self.robot + summed

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        robot = torch.zeros(1, dtype=torch.float64) if self.robot is None else self.robot
        parts = [self.loss, self.l1, self.within, self.unread, robot]
        total = ranks.sum(torch.cat(parts).to(ranks.device)).cpu()
        loss, l1, within, unread, robot = total.split([len(p) for p in parts])
        found = {"loss": loss[0] / loss[1], "undecodable": unread[0] / unread[1]}
        if l1[1]:
            found["action_l1"] = l1[0] / l1[1]
        for limit, hits in zip(self.thresholds, within[1:], strict=True):
            found[f"accuracy_{limit:g}"] = hits / within[0]
        for i, error in enumerate(robot[1:] if robot[0] else []):
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
