"""Tensors in files that torch.save wrote. Nothing but tensors and plain values is unpickled.

The pickle is read in fake mode, which makes tensors that know their place in the file and hold no
memory; the bytes of a tensor are read when it is asked for. Optimizer states and the like that lie
in the same file cost nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pizero.agent.weights.entry import Entry, read_tensor
from pizero.agent.weights.shards import TORCH_INDEX, expect_agreement, read_weight_map
from pizero.types import Tensor

WEIGHT_KEYS = ("model", "state_dict", "model_state_dict")  # where training programs put weights
_ZIP = b"PK\x03\x04"


class _Place(NamedTuple):
    """A tensor as a view of a storage, which lies at `offset` of the file."""

    path: Path
    offset: int
    storage: Entry
    stride: tuple[int, ...]
    first: int


class TorchSource:
    """The weights in a .pt file: the dictionary under one of WEIGHT_KEYS, or the file's own; or
    those of all shards of an index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        if not path.name.endswith(TORCH_INDEX):
            self._add(path)
            return
        names = read_weight_map(path)
        for shard in sorted(set(names.values())):
            self._add(path.parent / shard)
        expect_agreement(path, names, self.entries)

    def read(self, name: str) -> Tensor:
        entry, place = self.entries[name], self._places[name]
        if torch.empty(entry.shape, device="meta").stride() == place.stride:
            # Only the view's own part: several tensors may share one large storage.
            offset = place.offset + place.first * entry.dtype.itemsize
            return read_tensor(place.path, offset, entry)
        storage = read_tensor(place.path, place.offset, place.storage)
        return storage.as_strided(entry.shape, place.stride, place.first).contiguous()

    def _add(self, path: Path) -> None:
        for name, tensor in _weights(path, _unpickle(path)).items():
            storage = tensor.untyped_storage()
            count = storage.nbytes() // tensor.dtype.itemsize
            self.entries[name] = Entry(tuple(tensor.shape), tensor.dtype)
            self._places[name] = _Place(
                path=path,
                offset=int(storage._checkpoint_offset or 0),
                storage=Entry((count,), tensor.dtype),
                stride=tensor.stride(),
                first=int(tensor.storage_offset()),
            )


def _unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            raise ValueError(
                f"{path} is not a file of torch.save: expected a zip archive. It may be empty, "
                "truncated, or a bare pickle, which is not opened as it can run code."
            )
    try:
        with FakeTensorMode():
            return torch.load(path, weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names `{found[1]}`" if found else str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{path} is refused, and nothing in it was run: expected tensors and plain values "
            f"only, but {what}"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        reason = str(error).split(".")[0]
        raise ValueError(f"{path} is truncated or damaged: {reason}") from error


def _weights(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    key = next((k for k in WEIGHT_KEYS if isinstance(content.get(k), Mapping)), None)
    weights = content if key is None else content[key]
    other = [f"{k} ({type(v).__name__})" for k, v in weights.items() if not isinstance(v, Tensor)]
    if other or not weights:
        where = f"the dictionary itself, as none of {', '.join(WEIGHT_KEYS)} is there"
        raise ValueError(
            f"{path} has no dictionary of tensors. Looked at {f'`{key}`' if key else where}; "
            f"found {', '.join(other[:8]) or 'nothing in it'}"
        )
    return dict(weights)
