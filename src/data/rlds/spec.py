"""What a dataset holds: `features.json` as a flat table, and back.

tfds describes a dataset as a tree; on disk every leaf is one key such as `steps/observation/state`.
Here the leaves under `steps` and the others are two flat dictionaries of `FeatureSpec`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data.files import read_json

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
    """One leaf: `kind` is image, text, tensor, or ragged (a sequence of any length in each step).

    The dtype and shape of a ragged leaf are those of one of its elements; without a dtype it is of
    a kind that is not read.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...] = ()  # -1 where it varies
    encoding: str = "none"  # of a tensor: none, bytes or zlib; of an image: jpeg, png or ""
    description: str = ""
    codes: int = 0  # of a text: stored as so many numbers, one per character
    optional: bool = False  # a tensor that may be absent

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

    @property
    def absent(self) -> float:
        """What tfds reads where an optional value is absent: the smallest of the type."""
        dtype = np.dtype(self.dtype)
        if not self.optional or dtype.kind == "b":
            return 0
        return (np.finfo if dtype.kind == "f" else np.iinfo)(dtype).min

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
            body |= {"optional": True} if self.optional else {}
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
        """Read a `features.json` file; ValueError where it is none."""
        tree = read_json(path)
        try:
            return cls.from_json(tree)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: expected the features of a data set, got {what}") from error

    def to_json(self) -> dict[str, Any]:
        """The tree that tfds reads."""
        tree = _nest(self.episode)
        steps = {"feature": _tree_node(_nest(self.steps)), "length": "-1"}
        tree["steps"] = {"pythonClassName": _CLASSES["steps"], "sequence": steps}
        return _tree_node(tree)


def _leaves(node: Mapping[str, Any], path: str) -> Iterable[tuple[str, FeatureSpec]]:
    if "featuresDict" in node:
        for name, child in node["featuresDict"].get("features", {}).items():
            yield from _leaves(child, f"{path}/{name}" if path else name)
    elif "sequence" in node and path == STEPS.rstrip("/"):
        yield from _leaves(node["sequence"]["feature"], path)
    elif "sequence" in node:
        yield from _sequence(node["sequence"], path)
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
        if body["dtype"] not in ("string", "object", "bfloat16"):
            np.dtype(body["dtype"])  # refuses what is no type
        encoding = body.get("encoding", "none")
        if encoding not in ("none", "bytes", "zlib"):
            raise ValueError(f"{path}: expected an encoding none, bytes or zlib, got {encoding!r}")
        if body["dtype"] == "int32" and _is_spelt(path, _shape(body)):
            return FeatureSpec("text", "string", (), "none", description, _shape(body)[0])
        optional = bool(body.get("optional"))
        return FeatureSpec(
            "tensor", body["dtype"], _shape(body), encoding, description, optional=optional
        )
    if "classLabel" in node:
        return FeatureSpec("tensor", "int64", description=description)
    if "boundingBox" in node:
        body = node["boundingBox"]
        return FeatureSpec("tensor", body.get("dtype", "float32"), _shape(body) or (4,))
    return FeatureSpec("ragged", "", description=node.get("pythonClassName", description))


def _sequence(node: Mapping[str, Any], path: str) -> Iterable[tuple[str, FeatureSpec]]:
    """A list inside a step or an episode: of fixed length a further axis, otherwise ragged."""
    length = int(node.get("length", -1))
    for key, leaf in _leaves(node["feature"], path):
        if length > 0 and leaf.kind == "tensor" and leaf.encoding == "none":
            yield key, replace(leaf, shape=(length, *leaf.shape))
        elif leaf.kind in ("tensor", "text") and leaf.encoding == "none" and not leaf.codes:
            yield key, replace(leaf, kind="ragged")
        else:
            yield key, FeatureSpec("ragged", "")


def _is_spelt(path: str, shape: tuple[int, ...]) -> bool:
    """Some sets (language_table) keep instructions as code points in a long vector."""
    return path.endswith("instruction") and len(shape) == 1 and shape[0] > 1


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
