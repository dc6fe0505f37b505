"""Values that pass between data, model and agent, and the array types that describe them.

jaxtyping is optional here: without it the annotations mean nothing, which is what they mean in
production anyway. The test suite switches the checks on.

Axes: b batch, k flow samples of one observation, n cameras (times frames), s tokens, d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, Num, UInt8
    except ImportError:

        class _Unchecked:
            """Stands for a jaxtyping type where jaxtyping is not installed."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = Num = UInt8 = _Unchecked

__all__ = ["Batch", "Bool", "Float", "Int", "Num", "Observation", "Tensor", "UInt8"]


@dataclass(frozen=True)
class Observation:
    """What the policy sees: cameras, an instruction, and the robot's state.

    `images` are uint8, or float in [-1, 1]; several frames of one camera count as further cameras.
    A mask of None means that everything is present. `extras` feeds the streams a user adds.
    For models that speak, `token_causal` marks the tokens of an answer, which see only themselves
    and what came before, and `token_loss` those that are to be learnt.
    """

    images: Num[Tensor, "b n 3 height width"]
    tokens: Int[Tensor, "b text"]
    image_mask: Bool[Tensor, "b n"] | None = None
    token_mask: Bool[Tensor, "b text"] | None = None
    state: Float[Tensor, "b frames state_dim"] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    token_causal: Bool[Tensor, "b text"] | None = None
    token_loss: Bool[Tensor, "b text"] | None = None

    def to(self, device: torch.device | str) -> Observation:
        """The same observation on another device."""
        return _to(self, device)


@dataclass(frozen=True)
class Batch:
    """Observations with the actions that followed, as training reads them.

    `actions` are normalised and padded to the model's size; `action_mask` is True where an entry
    counts in the loss; `sample` is each row's global sample number, from which its noise, flow
    times and augmentation follow.
    """

    observation: Observation
    actions: Float[Tensor, "b horizon action_dim"]
    action_mask: Bool[Tensor, "b horizon action_dim"]
    sample: Int[Tensor, " b"]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return _to(self, device)


def _to(value: Any, device: torch.device | str) -> Any:
    moved = {}
    for f in fields(value):
        x = getattr(value, f.name)
        if isinstance(x, Tensor):
            moved[f.name] = x.to(device, non_blocking=True)
        elif isinstance(x, Observation):
            moved[f.name] = x.to(device)
        elif isinstance(x, Mapping):
            moved[f.name] = {k: v.to(device, non_blocking=True) for k, v in x.items()}
    return replace(value, **moved)
