"""Writing a safetensors file tensor by tensor, so that only one of them is ever in memory.

Byte for byte what the safetensors library writes, which wants all tensors at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pizero.agent.weights.entry import Entry
from pizero.agent.weights.safetensors_file import DTYPES
from pizero.types import Tensor

_ORDER = list(DTYPES.values())
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: str | Path,
    entries: Mapping[str, Entry],
    produce: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the tensors of `entries`, asking `produce` for each once, in the order of `entries`.

    The file appears under its name when it is whole. A produced tensor has to be what its entry
    says.
    """
    path = Path(path)
    header, places = _header(entries, metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for name, entry in entries.items():
                file.seek(len(header) + places[name])
                file.write(_bytes(name, entry, produce(name)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(
    entries: Mapping[str, Entry], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """The file up to the first tensor, and where after that each tensor begins."""
    for name, entry in entries.items():
        if entry.dtype not in _NAMES:
            raise ValueError(f"{name} has dtype {entry.dtype}, which safetensors files cannot hold")
    names = sorted(entries, key=lambda n: (_ORDER.index(entries[n].dtype), n))
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places = {}
    end = 0
    for name in names:
        begin, end = end, end + entries[name].num_bytes
        places[name] = begin
        fields[name] = {
            "dtype": _NAMES[entries[name].dtype],
            "shape": list(entries[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _bytes(name: str, entry: Entry, tensor: Tensor) -> memoryview:
    got = Entry(tuple(tensor.shape), tensor.dtype)
    if got != entry:
        raise ValueError(f"{name}: expected {entry}, got {got}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
