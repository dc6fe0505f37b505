"""The norms of a load report are exact for every layout in memory."""

from __future__ import annotations

import math

import pytest
import torch

from pizero.agent.weights.report import sum_of_squares

NUMBERS = torch.randn(70, 80, 90, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "view",
    [lambda t: t, lambda t: t.permute(2, 0, 1), lambda t: t[3:, :, ::2].mT, lambda t: t[0, 0, 0]],
)
def test_sums_are_exact(dtype, view):
    numbers = view(NUMBERS.to(dtype))
    assert sum_of_squares(numbers) == pytest.approx(
        numbers.double().square().sum().item(), rel=1e-13
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_number_that_is_none_shows(value):
    numbers = NUMBERS.clone()
    numbers[69, 3, 2] = value
    assert not math.isfinite(sum_of_squares(numbers))
    assert sum_of_squares(torch.zeros(0, 3)) == 0
