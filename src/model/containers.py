"""Module containers that know what they hold, for readers and type checkers.

At run time they are PyTorch's own; names in a state dict are the same.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, ValuesView
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Stack(nn.ModuleList, Generic[M]):
    """A list of modules of one kind."""

    if TYPE_CHECKING:

        def __getitem__(self, i: int) -> M: ...  # pyright: ignore[reportIncompatibleMethodOverride]
        def __iter__(self) -> Iterator[M]: ...


class Named(nn.ModuleDict, Generic[M]):
    """Modules of one kind by name."""

    if TYPE_CHECKING:

        def __getitem__(self, name: str) -> M: ...
        def items(self) -> ItemsView[str, M]: ...
        def values(self) -> ValuesView[M]: ...
