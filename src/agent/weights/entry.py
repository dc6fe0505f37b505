"""One stored tensor: its shape, its dtype, and how its bytes get from a file into memory.

Bytes are read, never mapped: pages of a mapped file that were touched count as this process's
memory until the map is gone, so that a checkpoint would take its size twice while it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from pizero.types import Tensor


class Entry(NamedTuple):
    """What a checkpoint says about a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def read_tensor(path: Path, offset: int, entry: Entry) -> Tensor:
    """A new tensor from the bytes that start at `offset`."""
    raw = torch.empty(entry.num_bytes, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(offset)
        # Unlike read(), this makes no second copy, and buffered files read all that is asked for.
        count = file.readinto(raw.numpy().data)
    if count != entry.num_bytes:
        raise ValueError(
            f"{path} is truncated: {entry.num_bytes} bytes expected at {offset}, got {count}"
        )
    return raw.view(entry.dtype).reshape(entry.shape)
