"""Checkpoint files for tests, whole and damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def truncate(path: Path, keep: int | None = None) -> None:
    """Cut a file: to half, to `keep` bytes, or by -`keep` bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if keep is None else keep])


def orbax_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    root: bool = True,
    leaf: bool = True,
    database: bool = True,
    version: int = 2,
) -> Path:
    """Write parameters as Orbax does: names joined by "/" under `params`, and with `value`."""
    import tensorstore

    folder.mkdir(parents=True, exist_ok=True)
    tree = {}
    for name, tensor in tensors.items():
        keys = ["params"] * root + name.split("/") + ["value"] * leaf
        place: dict[str, Any] = {"driver": "file", "path": f"{folder.absolute()}/"}
        if database:
            place = {"driver": "ocdbt", "base": place, "path": ".".join(keys) + "/"}
        else:
            place["path"] += ".".join(keys) + "/"
        kind = {2: "zarr", 3: "zarr3"}[version]
        bits = tensor.dtype == torch.bfloat16
        store = tensorstore.open(
            {"driver": kind, "kvstore": place},
            create=True,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
        ).result()
        values = tensor.view(torch.int16).numpy() if bits else tensor.numpy()
        store.write(values.view(store.dtype.numpy_dtype) if bits else values).result()
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    tree["('params', 'empty')"] = {
        "key_metadata": [{"key": "params", "key_type": 2}, {"key": "empty", "key_type": 2}],
        "value_metadata": {"value_type": "Dict", "skip_deserialize": True},
    }
    content = {
        "tree_metadata": tree,
        "use_zarr3": version == 3,
        "store_array_data_equal_to_fill_value": True,
    }
    (folder / "_METADATA").write_text(json.dumps(content))
    return folder
