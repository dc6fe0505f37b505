"""Tensors in safetensors files: one file, or shards that an index lists.

The format is a length (8 bytes, little endian), a JSON header of that length with dtype, shape and
place of every tensor, and the bytes. The header is read here and not by the safetensors library,
because that maps the file (see entry.py), and for errors that say what is wrong with which file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pizero.agent.weights.entry import Entry, read_tensor
from pizero.agent.weights.shards import SAFETENSORS_INDEX, expect_agreement, read_weight_map
from pizero.types import Tensor

# In the order in which the library puts tensors into a file.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# A header above this is damage: the largest published ones have a few hundred kilobytes.
_MAX_HEADER = 100_000_000


class _Place(NamedTuple):
    path: Path
    offset: int


class SafetensorsSource:
    """The tensors of one safetensors file, or of all shards of an index."""

    def __init__(self, path: Path, *more: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        if path.name.endswith(SAFETENSORS_INDEX):
            self._add_shards(path)
        else:
            self._add(path)
        for other in more:
            self._add(other)

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        return read_tensor(place.path, place.offset, self.entries[name])

    def _add(self, path: Path) -> None:
        header, start = _read_header(path)
        self.metadata |= header.pop("__metadata__", {})
        for name, (entry, begin) in _parse(path, header, path.stat().st_size - start).items():
            self.entries[name] = entry
            self._places[name] = _Place(path, start + begin)

    def _add_shards(self, index: Path) -> None:
        names = read_weight_map(index)
        for shard in sorted(set(names.values())):
            self._add(index.parent / shard)
        expect_agreement(index, names, self.entries)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the tensors begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(8)
        length = int.from_bytes(beginning, "little")
        if beginning == b"version ":
            raise ValueError(
                f"{path} is a pointer of Git LFS and not the weights: run `git lfs pull` there"
            )
        if len(beginning) < 8 or length > size - 8 or length > _MAX_HEADER:
            raise ValueError(
                f"{path} is truncated or no safetensors file: it has {size} bytes, and the first 8 "
                f"announce a header of {length}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is no JSON object")
    return header, 8 + length


def _parse(path: Path, header: Mapping[str, Any], size: int) -> dict[str, tuple[Entry, int]]:
    """Entry and place of every tensor, checked against the `size` of what follows the header."""
    parsed = {}
    total = 0
    for name, fields in header.items():
        try:
            entry = Entry(tuple(map(int, fields["shape"])), DTYPES[fields["dtype"]])
            begin, end = fields["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the header is damaged at {name}: {fields}") from error
        if begin < 0 or end - begin != entry.num_bytes:
            raise ValueError(
                f"{path}: the header is damaged at {name}: {list(entry.shape)} {fields['dtype']} "
                f"takes {entry.num_bytes} bytes, not those from {begin} to {end}"
            )
        parsed[name] = (entry, begin)
        total = max(total, end)
    if total > size:
        raise ValueError(
            f"{path} is truncated: its tensors take {total} bytes and {size} are there"
        )
    if total < size:
        raise ValueError(f"{path} is damaged: {size - total} bytes follow its last tensor")
    return parsed
