"""Tensors in Orbax checkpoints, as JAX programs write them; read without JAX.

A folder has `_METADATA` (the tree of parameters, JSON) and zarr arrays: in an OCDBT database
(`manifest.ocdbt`), or each in a folder of its own. tensorstore reads both. Arrays keep JAX's
layout, and hold all layers of a kind: what reads them should start with the largest, while little
else is in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pizero.agent.weights.entry import Entry
from pizero.types import Tensor

if TYPE_CHECKING:
    import tensorstore

METADATA = "_METADATA"
ROOT, LEAF = "params", "value"  # what openpi's training state wraps names in


class OrbaxSource:
    """The parameters in a folder with `_METADATA`; names are joined with "/"."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        tree, options = _read_tree(path)
        opened = {
            name: _open(path, ".".join(keys), options)
            for name, keys in zip(_names(tree), tree, strict=True)
        }
        self._arrays = {name: _wait(path, name, future) for name, future in opened.items()}
        self.entries = {name: _entry(path, name, a) for name, a in self._arrays.items()}

    def read(self, name: str) -> Tensor:
        array = _wait(self.path, name, self._arrays[name].read())
        if self.entries[name].dtype == torch.bfloat16:
            # numpy has no such type of its own: torch takes the bits.
            return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(array)


def _read_tree(path: Path) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """Path of keys of every array, and the rest of `_METADATA`."""
    try:
        content = json.loads((path / METADATA).read_text())
        leaves = [
            tuple(str(k["key"]) for k in leaf["key_metadata"])
            for leaf in content["tree_metadata"].values()
            # Empty branches of the tree are listed too, and have no array.
            if not leaf["value_metadata"].get("skip_deserialize")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / METADATA} is truncated or no tree of Orbax") from error
    if not leaves:
        raise ValueError(f"{path / METADATA} lists no arrays")
    return leaves, content


def _names(tree: list[tuple[str, ...]]) -> list[str]:
    if all(keys[0] == ROOT and len(keys) > 1 for keys in tree):
        tree = [keys[1:] for keys in tree]
    if all(keys[-1] == LEAF and len(keys) > 1 for keys in tree):
        tree = [keys[:-1] for keys in tree]
    return ["/".join(keys) for keys in tree]


def _open(path: Path, name: str, options: dict[str, Any]) -> tensorstore.Future:
    try:
        import tensorstore
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is an Orbax checkpoint, and reading those needs tensorstore: "
            "pip install 'pizero[orbax]'"
        ) from error
    folder = {"driver": "file", "path": f"{path.absolute()}/"}
    if (path / "manifest.ocdbt").is_file():
        store = {"driver": "ocdbt", "base": folder, "path": f"{name}/"}
    else:
        store = folder | {"path": f"{path.absolute()}/{name}/"}
    spec = {"driver": "zarr3" if options.get("use_zarr3") else "zarr", "kvstore": store}
    if options.get("store_array_data_equal_to_fill_value"):
        # Every chunk was written, so that one which is absent is lost and does not mean zeros.
        spec["fill_missing_data_reads"] = False
    return tensorstore.open(spec, open=True, read=True)


def _wait(path: Path, name: str, future: tensorstore.Future) -> Any:
    try:
        return future.result()
    except Exception as error:  # by kind of trouble, tensorstore raises many built-in classes
        reason = str(error).split(" [source locations")[0]
        raise ValueError(f"{path} is incomplete or damaged at {name}: {reason}") from error


def _entry(path: Path, name: str, array: tensorstore.TensorStore) -> Entry:
    dtype = getattr(torch, array.dtype.name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{path}: {name} has dtype {array.dtype.name}, unknown to torch")
    return Entry(tuple(array.shape), dtype)
