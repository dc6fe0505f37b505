"""A data set that TensorFlow Datasets itself writes, and what it reads from one.

`write_every_encoding` makes the set of tests/data/rlds_tf, against which the reader is tested where
there is no TensorFlow.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LENGTHS = (3, 1, 2)  # steps of each episode
NUMBERS = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64"),
)
RAW = ("bool", "uint8", "int16", "uint64", "float32", "float64")
PACKED = ("bool", "int32", "uint64", "float64")
EXPECTED = "expected.npz"
HEIGHT, WIDTH = 4, 6


def write_every_encoding(folder: Path) -> Path:
    """Write a set with every encoding that RLDS sets use, and beside it what tfds reads from it."""
    import tensorflow_datasets as tfds

    class EveryEncoding(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=_features(tfds.features))

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, Any]]:
            for number, length in enumerate(LENGTHS):
                yield f"{number}", _episode(number, length)

    builder = EveryEncoding(data_dir=str(folder))
    builder.download_and_prepare()
    path = Path(builder.data_dir)
    features = path / "features.json"
    features.write_text(json.dumps(json.loads(features.read_text())))  # half of it is blanks
    np.savez_compressed(path / EXPECTED, **tfds_arrays(path, "train"))
    return path


def tfds_arrays(path: Path, split: str) -> dict[str, np.ndarray]:
    """All values of a split as tfds decodes them, episode after episode as the files have them.

    A key of the Example stands for one array over steps or episodes; where shapes differ, `<key>/0`
    and so on for one array each. Of a ragged key there are all values, and in `<key>/lengths` how
    many each row has. A picture without bytes, which tfds cannot decode, has no pixels.
    """
    arrays: dict[str, np.ndarray] = {}
    for key, (feature, values) in _rows(path, split).items():
        if feature is None:
            values = [np.asarray(getattr(v, "flat_values", v)) for v in values]
            arrays[f"{key}/lengths"] = np.array([len(v) for v in values])
            arrays[key] = _plain(np.concatenate(values))
            continue
        if _is_picture(feature):
            none = np.zeros((0, 0, 3), np.uint8)
            values = [feature.decode_example(v).numpy() if v.numpy() else none for v in values]
        values = [np.asarray(v) for v in values]
        if len({v.shape for v in values}) > 1:
            arrays |= {f"{key}/{i}": v for i, v in enumerate(values)}
        else:
            arrays[key] = _plain(np.stack(values))
    return arrays


def tfds_pictures(path: Path, split: str) -> dict[str, list[bytes]]:
    """The stored bytes of all pictures of the steps, by key."""
    rows = _rows(path, split).items()
    return {key: [v.numpy() for v in values] for key, (f, values) in rows if _is_picture(f)}


def _rows(path: Path, split: str) -> dict[str, tuple[Any, list[Any]]]:
    """Feature (None: a list in each row) and values of each key, pictures still encoded."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(path))
    features = dict(_leaves(tfds, builder.info.features, ""))
    skip: dict[str, Any] = {}
    for key, feature in features.items():
        if _is_picture(feature):
            *parents, name = key.split("/")
            node = skip
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = tfds.decode.SkipDecoding()
    once = tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1)
    rows: dict[str, list[Any]] = {}
    for episode in builder.as_dataset(split=split, decoders=skip or None, read_config=once):
        for step in episode.pop("steps"):
            _collect(rows, step, "steps/")
        _collect(rows, episode, "")
    return {key: (features[key], values) for key, values in rows.items()}


def _is_picture(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _collect(rows: dict[str, list[Any]], tree: Any, prefix: str) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _collect(rows, value, f"{prefix}{key}/")
        else:
            rows.setdefault(f"{prefix}{key}", []).append(value)


def _leaves(tfds: Any, feature: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Flat keys and features; None for a list inside a step or an episode."""
    below = f"{path}/" if path else ""
    if isinstance(feature, tfds.features.Dataset):
        yield from _leaves(tfds, feature.feature, path)
    elif isinstance(feature, tfds.features.FeaturesDict):
        for key in feature:
            yield from _leaves(tfds, feature[key], f"{below}{key}")
    elif isinstance(feature, tfds.features.Sequence):
        for key, _ in _leaves(tfds, feature.feature, path):
            yield key, None
    else:
        yield path, feature


def _plain(values: np.ndarray) -> np.ndarray:
    """Texts as numpy's own strings, which .npz takes without pickling."""
    if values.dtype.kind not in "OS":
        return values
    return np.array([v.decode() for v in values.ravel()], np.str_).reshape(values.shape)


def _features(f: Any) -> Any:
    def numbers(shape: tuple[int, ...], kinds: tuple[str, ...], **options: Any) -> dict[str, Any]:
        return {k: f.Tensor(shape=shape, dtype=np.dtype(k), **options) for k in kinds}

    def picture(channels: int = 3, **options: Any) -> Any:
        return f.Image(shape=(HEIGHT, WIDTH, channels), **options)

    steps = {
        "observation": {
            "jpeg": picture(encoding_format="jpeg"),
            "png": picture(encoding_format="png"),
            "any": f.Image(),
            "rgba": picture(4),
            "grey": picture(1),
            "depth": picture(1, dtype=np.uint16, encoding_format="png"),
            "metres": picture(1, dtype=np.float32),
            "empty": picture(encoding_format="jpeg"),
        },
        "number": numbers((2,), NUMBERS),
        "scalar": {k: f.Scalar(np.dtype(k)) for k in ("bool", "uint64", "float64")},
        "raw": numbers((2, 3), RAW, encoding="bytes"),
        "packed": numbers((2, 3), PACKED, encoding="zlib"),
        "text": f.Text(),
        "string": f.Tensor(shape=(), dtype=np.object_),
        "label": f.ClassLabel(names=["push", "pick", "place"]),
        "box": f.BBoxFeature(),
        "ragged": {
            "number": f.Sequence(np.float32),
            "row": f.Sequence(f.Tensor(shape=(3,), dtype=np.int32)),
            "text": f.Sequence(f.Text()),
            "tree": f.Sequence({"a": np.int32, "b": f.Text()}),
            "deep": f.Sequence(f.Sequence(np.int64)),
            "packed": f.Sequence(f.Tensor(shape=(2,), dtype=np.float32, encoding="zlib")),
        },
        "words": f.Tensor(shape=(2,), dtype=np.object_),
        "varying": f.Tensor(shape=(None,), dtype=np.float32, encoding="zlib"),
        "matrix": f.Tensor(shape=(None, None), dtype=np.float32, encoding="bytes"),
        "action": f.Tensor(shape=(2,), dtype=np.float32, doc="episode, step"),
        "is_first": np.bool_,
        "is_last": np.bool_,
    }
    metadata = {
        "path": f.Text(),
        "number": np.int64,
        "large": np.uint64,
        "flag": np.bool_,
        "vector": f.Tensor(shape=(3,), dtype=np.float64),
        "packed": f.Tensor(shape=(3,), dtype=np.float32, encoding="zlib"),
        "picture": picture(encoding_format="png"),
        "names": f.Sequence(f.Text()),
        "counts": f.Sequence(np.int32),
        "label": f.ClassLabel(num_classes=4),
        "optional": {
            "number": f.Tensor(shape=(), dtype=np.int32, optional=True),
            "vector": f.Tensor(shape=(2,), dtype=np.float32, optional=True),
            "flag": f.Tensor(shape=(), dtype=np.bool_, optional=True),
        },
    }
    return f.FeaturesDict(
        {"steps": f.Dataset(steps), "episode_metadata": metadata, "aspects": {"good": np.bool_}}
    )


def _episode(number: int, length: int) -> dict[str, Any]:
    generator = np.random.default_rng(number)
    metadata = {
        "path": f"größe/{number}",
        "number": -number,
        "large": np.uint64(2**64 - 1 - number),
        "flag": number % 2 == 1,
        "vector": generator.standard_normal(3),
        "packed": generator.standard_normal(3).astype(np.float32),
        "picture": _picture(generator, "PNG"),
        "names": ["a", "bc"][: number % 3],
        "counts": np.arange(number, dtype=np.int32),
        "label": number % 4,
        "optional": {
            "number": None if number % 2 else number,
            "vector": None if number % 2 else np.array([number, 1], np.float32),
            "flag": None if number % 2 else True,
        },
    }
    steps = [_step(generator, number, step, length) for step in range(length)]
    return {"steps": steps, "episode_metadata": metadata, "aspects": {"good": number % 2 == 0}}


def _step(generator: np.random.Generator, number: int, step: int, length: int) -> dict[str, Any]:
    few = step % 3  # entries of a ragged value
    odd = (HEIGHT + step, WIDTH + number)
    return {
        "observation": {
            "jpeg": _picture(generator, "JPEG"),
            "png": _picture(generator, "PNG"),
            "any": _picture(generator, "PNG" if step % 2 else "JPEG", odd),
            "rgba": _picture(generator, "PNG", channels=4),
            "grey": _picture(generator, "PNG", channels=1),
            "depth": _numbers(generator, "uint16", (HEIGHT, WIDTH, 1), number),
            "metres": _numbers(generator, "float32", (HEIGHT, WIDTH, 1), number),
            "empty": io.BytesIO(),
        },
        "number": {k: _numbers(generator, k, (2,), number) for k in NUMBERS},
        "scalar": {
            k: _numbers(generator, k, (1,), number)[0] for k in ("bool", "uint64", "float64")
        },
        "raw": {k: _numbers(generator, k, (2, 3), number) for k in RAW},
        "packed": {k: _numbers(generator, k, (2, 3), number) for k in PACKED},
        "text": ("push", "größer", "", f"{number} {step}")[step % 4],
        "string": f"string {step}".encode(),
        "label": ("push", "pick", "place")[few],
        "box": np.array([0.0, 0.25, 0.5, 1.0], np.float32),
        "ragged": {
            "number": generator.standard_normal(few).astype(np.float32),
            "row": generator.integers(-9, 9, ((step + 1) % 3, 3)).astype(np.int32),
            "text": ["x", "yz"][:few],
            "tree": [{"a": 1, "b": "c"}, {"a": 2, "b": ""}][:few],
            "deep": [[1, 2], [3]][:few],
            "packed": [generator.standard_normal(2).astype(np.float32)] * few,
        },
        "words": np.array([b"a", b"bc"], object),
        "varying": generator.standard_normal(few).astype(np.float32),
        "matrix": generator.standard_normal((few, 2)).astype(np.float32),
        "action": np.array([number, step], np.float32),
        "is_first": step == 0,
        "is_last": step == length - 1,
    }


def _numbers(
    generator: np.random.Generator, kind: str, shape: tuple[int, ...], number: int
) -> np.ndarray:
    """Random values of a type; the first of whole ones is its smallest or largest."""
    dtype = np.dtype(kind)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(bool)
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    ends = np.iinfo(dtype)
    values = generator.integers(ends.min, ends.max, shape, dtype=dtype, endpoint=True)
    values.flat[0] = ends.min if number % 2 else ends.max
    return values


def _picture(
    generator: np.random.Generator,
    form: str,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    channels: int = 3,
) -> io.BytesIO:
    pixels = generator.integers(0, 256, (*size, channels)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(stream, form)
    stream.seek(0)  # tfds reads from here on; at the end it would store nothing
    return stream
