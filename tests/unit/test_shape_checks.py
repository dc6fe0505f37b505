"""The lane that checks shapes does check them: a wrong shape is caught in each kind of place.

The checks are switched on for the whole run by `--jaxtyping-packages` (see `.ci/test`), so these
tests only make sense there; asked for, they may not be skipped.
"""

from __future__ import annotations

import pytest
import torch

from pizero.model.attention import attend
from pizero.types import Observation


@pytest.fixture(autouse=True)
def _lane(request):
    if not request.config.getoption("--jaxtyping-packages"):
        pytest.skip("needs --jaxtyping-packages=pizero,shape_checks.check, as make test gives it")


def _observation(**changes) -> Observation:
    values = {
        "images": torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8),
        "tokens": torch.zeros(2, 5, dtype=torch.int64),
    }
    return Observation(**(values | changes))


def test_right_shapes_pass():
    assert _observation(image_mask=torch.ones(2, 1, dtype=torch.bool)).tokens.shape == (2, 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", torch.zeros(3, 5, dtype=torch.int64)),  # another batch size than images
        ("tokens", torch.zeros(2, 5)),  # another dtype
        ("image_mask", torch.ones(2, dtype=torch.bool)),  # an axis too few
    ],
)
def test_wrong_field_of_a_value_is_caught(field, value):
    with pytest.raises(TypeError, match=field):
        _observation(**{field: value})


def test_wrong_argument_of_a_function_is_caught():
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 1, 8)
    assert attend(q, k, k).shape == q.shape
    with pytest.raises(TypeError, match="parameter 'v'"):
        attend(q, k, k[..., :7])
