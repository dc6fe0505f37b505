"""Checkpoints in several files: an index, in JSON, tells which tensor is in which."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

SAFETENSORS_INDEX, TORCH_INDEX = ".safetensors.index.json", ".bin.index.json"


def read_weight_map(index: Path) -> Mapping[str, str]:
    """File name by tensor name. Raises ValueError where files are missing."""
    try:
        names: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} has no readable `weight_map`") from error
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(shards)} shards that {index} lists are missing: "
            + ", ".join(missing)
        )
    return names


def expect_agreement(index: Path, names: Mapping[str, str], found: Iterable[str]) -> None:
    """Raises ValueError where an index and the tensors in its files are not the same."""
    found = set(found)
    wrong = [f"{name} is not in {names[name]}" for name in names if name not in found]
    wrong += [f"{name} is not in the index" for name in sorted(found) if name not in names]
    if wrong:
        raise ValueError(f"{index} and its shards disagree: " + "; ".join(wrong[:5]))
