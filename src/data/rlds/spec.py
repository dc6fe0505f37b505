"""What a dataset holds: `features.json` as a flat table, and back.

tfds describes a dataset as a tree; on disk every leaf is one key such as `steps/observation/state`.
Here the leaves under `steps` and the others are two flat dictionaries of `FeatureSpec`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_TFDS = "tensorflow_datasets.core.features."
_CLASSES = {
    "image": _TFDS + "image_feature.Image",
    "text": _TFDS + "text_feature.Text",
    "tensor": _TFDS + "tensor_feature.Tensor",
    "scalar": _TFDS + "scalar.Scalar",
    "dict": _TFDS + "features_dict.FeaturesDict",
    "steps": _TFDS + "dataset_feature.Dataset",
}
STEPS = "steps/"


@dataclass(frozen=True)
class FeatureSpec:
    """One leaf: `kind` is image, text, tensor, or ragged (a sequence inside a step, not read)."""

    kind: str
    dtype: str
    shape: tuple[int, ...] = ()  # -1 where it varies
    encoding: str = "none"  # of a tensor: none, bytes or zlib; of an image: jpeg, png or ""
    description: str = ""

    @classmethod
    def image(cls, height: int, width: int, *, encoding: str = "jpeg") -> FeatureSpec:
        """An RGB image stored as JPEG or PNG bytes."""
        if encoding not in ("jpeg", "png"):
            raise ValueError(f"an image is stored as 'jpeg' or 'png', got {encoding!r}")
        return cls("image", "uint8", (height, width, 3), encoding)

    @classmethod
    def text(cls) -> FeatureSpec:
        """A string."""
        return cls("text", "string")

    @classmethod
    def tensor(
        cls, shape: Iterable[int], dtype: str = "float32", *, encoding: str = "none"
    ) -> FeatureSpec:
        """An array; `encoding` zlib or bytes stores it as one byte string per step."""
        if encoding not in ("none", "bytes", "zlib"):
            raise ValueError(f"a tensor is encoded as none, bytes or zlib, got {encoding!r}")
        return cls("tensor", str(np.dtype(dtype)), tuple(shape), encoding)

    @classmethod
    def scalar(cls, dtype: str = "float32") -> FeatureSpec:
        """A number or a flag."""
        return cls("tensor", str(np.dtype(dtype)))

    @property
    def size(self) -> int:
        """Numbers in one value of fixed shape."""
        return int(np.prod(self.shape, dtype=np.int64))

    def to_json(self) -> dict[str, Any]:
        """The node of `features.json`."""
        shape = {"dimensions": [str(d) for d in self.shape]} if self.shape else {}
        if self.kind == "image":
            name = "image"
            body: dict[str, Any] = {"shape": shape, "dtype": self.dtype}
            body |= {"encodingFormat": self.encoding} if self.encoding else {}
        elif self.kind == "text":
            name, body = "text", {}
        elif self.kind == "tensor":
            name, body = "tensor", {"shape": shape, "dtype": self.dtype, "encoding": self.encoding}
        else:
            raise ValueError(f"a {self.kind} feature cannot be written")
        class_key = "scalar" if self.kind == "tensor" and not self.shape else self.kind
        node: dict[str, Any] = {"pythonClassName": _CLASSES[class_key], name: body}
        return node | ({"description": self.description} if self.description else {})


@dataclass(frozen=True)
class DatasetSpec:
    """The flat features of a dataset: `steps` without the `steps/` prefix, `episode` all others."""

    steps: Mapping[str, FeatureSpec]
    episode: Mapping[str, FeatureSpec] = field(default_factory=dict)

    @classmethod
    def from_flat(cls, features: Mapping[str, FeatureSpec]) -> DatasetSpec:
        """Split flat keys, e.g. `steps/action` and `episode_metadata/task`, into the two tables."""
        steps = {k.removeprefix(STEPS): v for k, v in features.items() if k.startswith(STEPS)}
        episode = {k: v for k, v in features.items() if not k.startswith(STEPS)}
        if not steps:
            raise ValueError(
                f"expected features under 'steps/', got only {sorted(features) or 'none'}"
            )
        return cls(steps, episode)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> DatasetSpec:
        """Read the tree of a `features.json`."""
        return cls.from_flat(dict(_leaves(tree, "")))

    @classmethod
    def load(cls, path: str | Path) -> DatasetSpec:
        """Read a `features.json` file."""
        return cls.from_json(json.loads(Path(path).read_text()))

    def to_json(self) -> dict[str, Any]:
        """The tree that tfds reads."""
        tree = _nest(self.episode)
        steps = {"feature": _tree_node(_nest(self.steps)), "length": "-1"}
        tree["steps"] = {"pythonClassName": _CLASSES["steps"], "sequence": steps}
        return _tree_node(tree)


def unknown_key(key: str, known: Iterable[str], *, where: str) -> ValueError:
    """An error for a key that is not there: lists what is, and the nearest name."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"{where} has no {key!r}{hint} It has: {', '.join(names) or 'nothing'}")


def _leaves(node: Mapping[str, Any], path: str) -> Iterable[tuple[str, FeatureSpec]]:
    if "featuresDict" in node:
        for name, child in node["featuresDict"].get("features", {}).items():
            yield from _leaves(child, f"{path}/{name}" if path else name)
    elif "sequence" in node and path == STEPS.rstrip("/"):
        yield from _leaves(node["sequence"]["feature"], path)
    elif "sequence" in node:
        yield path, FeatureSpec("ragged", "")
    else:
        yield path, _leaf(node, path)


def _leaf(node: Mapping[str, Any], path: str) -> FeatureSpec:
    description = node.get("description", "")
    if isinstance(description, Mapping):
        description = str(description.get("description", ""))
    if "image" in node:
        body = node["image"]
        encoding = body.get("encodingFormat", "")
        return FeatureSpec("image", body["dtype"], _shape(body), encoding, description)
    if "text" in node:
        return FeatureSpec("text", "string", description=description)
    if "tensor" in node:
        body = node["tensor"]
        if body["dtype"] in ("string", "object") and not _shape(body):
            return FeatureSpec("text", "string", description=description)
        encoding = body.get("encoding", "none")
        return FeatureSpec("tensor", body["dtype"], _shape(body), encoding, description)
    if "classLabel" in node:
        return FeatureSpec("tensor", "int64", description=description)
    return FeatureSpec("ragged", node.get("pythonClassName", ""), description=description)


def _shape(body: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(d) for d in body.get("shape", {}).get("dimensions", []))


def _nest(flat: Mapping[str, FeatureSpec]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, spec in flat.items():
        node = tree
        *parents, leaf = key.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = spec
    return tree


def _tree_node(tree: Any) -> dict[str, Any]:
    if isinstance(tree, FeatureSpec):
        return tree.to_json()
    if "pythonClassName" in tree:
        return tree
    features = {name: _tree_node(child) for name, child in tree.items()}
    return {"pythonClassName": _CLASSES["dict"], "featuresDict": {"features": features}}
