"""An exponential moving average of the trained weights, in fp32.

The decay warms up, min(decay, (1 + n) / (10 + n)) after n updates, so a short run's average is not
its random start. It is a function of the step: there is nothing to save beyond the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """The average of a model's trained parameters; frozen ones are not kept twice."""

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the weights; `updates` counts the updates made before this one."""
        weight = 1 - decay_after(updates, self.decay)
        weights = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, weight)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average as its weights inside this context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the average from a checkpoint's weights."""
        for name, average in self.average.items():
            average.copy_(weights[name])

    def _swap(self) -> None:
        # Exchanging the storage is exact and needs no third copy of the weights.
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data


def decay_after(updates: int, decay: float) -> float:
    """The decay of the update that follows `updates` earlier ones."""
    return min(decay, (1 + updates) / (10 + updates))
