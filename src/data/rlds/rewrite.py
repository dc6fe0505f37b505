"""Rewrite an RLDS set: smaller pictures, channels put right, successful episodes only.

    record of a shard -> the lists of some keys changed, all else byte for byte -> same shard, new

A shard is written under a temporary name and renamed once it is whole, so a job that was stopped
goes on with the shards that are missing, and several jobs may share a set (`part`). A process holds
one episode at a time. `dataset_info.json` comes last and marks the set as complete.
"""

from __future__ import annotations

import fcntl
import io
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from pizero.data.files import read_json, write_whole
from pizero.data.images import (
    decode_image,
    decode_stored,
    encode_image,
    resize_depth,
    resize_image,
)
from pizero.data.index import unknown_key
from pizero.data.progress import watched
from pizero.data.rlds.example import Feature, Value, parse_example, replace_features
from pizero.data.rlds.index import find_dataset
from pizero.data.rlds.spec import STEPS, DatasetSpec, FeatureSpec
from pizero.data.rlds.tfrecord import (
    CorruptRecordError,
    frame_record,
    scan_records,
    verify_record,
)

SMALLEST = 64  # pixels; what has a shorter side stays as it is
PLAN = "rewrite.json"  # what was done, beside the result
WRIST_KEYS = ("wrist_image", "hand_image")
SUCCESS_KEYS = ("success", "episode_metadata/success", "aspects/success")
# What is known to be wrong with published sets, by rlds_dataset_mod's list.
KNOWN_FIXES: dict[str, dict[str, Any]] = {
    "kuka": {"success": "success"},
    "berkeley_autolab_ur5": {"flip": ("hand_image",)},
    "stanford_hydra_dataset_converted_externally_to_rlds": {"flip": ("image", "wrist_image")},
    "utaustin_mutex": {"flip": ("image", "wrist_image")},
    "berkeley_fanuc_manipulation": {"flip": ("image", "wrist_image")},
}
_OURS = ("features.json", "dataset_info.json", "dataset_statistics", PLAN)  # not copied
_PNG = b"\x89PNG"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True)
class Changes:
    """What is to be different.

    size         (height, width) of all pictures whose sides are at least SMALLEST, up or down; the
                 aspect ratio is not kept. Colours go through Lanczos and become JPEG, what has
                 "depth" in its name or more than 8 bits goes through bilinear and becomes PNG
    quality      of JPEG, likewise `subsampling` as in encode_image
    flip         pictures whose red and blue change places: keys below steps/, or their last word
    success      an episode feature that must be true, or the episode is left out
    """

    size: tuple[int, int] | None = None
    quality: int = 95
    subsampling: str = "420"
    flip: tuple[str, ...] = ()
    success: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"expected size (height, width) of at least 1, got {self.size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"expected quality in 1..100, got {self.quality}")


@dataclass(frozen=True)
class Outcome:
    """What a job has done. `episodes`, `dropped` and `damaged` count this run, not earlier ones."""

    folder: Path
    is_complete: bool
    episodes: int = 0
    dropped: int = 0
    damaged: tuple[str, ...] = ()


def rewrite(
    source: str | Path,
    target: str | Path,
    *,
    changes: Changes,
    num_workers: int | None = None,
    part: tuple[int, int] = (0, 1),
    on_error: str = "raise",
) -> Outcome:
    """Write the set of `source` with its changes to <target>/<name>/<version>.

    `num_workers` processes share the shards; None: one per CPU. `part` (i, n) does every n-th shard
    only, for several machines; whoever writes the last shard completes the set. Damaged records and
    pictures are CorruptRecordErrors with file and offset, or with `on_error` skip left out and
    counted.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"expected on_error raise or skip, got {on_error!r}")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"expected part (i, n) with 0 <= i < n, got {part}")
    directory = find_dataset(source)
    info = _read_info(directory)
    shards = _shards(directory, info)
    spec = DatasetSpec.load(directory / "features.json")
    plan = plan_pictures(spec, changes)
    success = None if changes.success is None else _episode_key(spec, changes.success, directory)
    if not plan and success is None:
        raise ValueError(
            f"{directory}: nothing would change; expected a size, channels to flip or a filter"
        )
    names = (info["name"], info.get("configName"), info["version"])
    folder = Path(target).expanduser().resolve().joinpath(*(name for name in names if name))
    _agree(folder, directory, shards, changes)
    missing = [
        shard
        for i, shard in enumerate(shards)
        if i % part[1] == part[0] and not (folder / shard.name).exists()
    ]
    work = partial(_rewrite_shard, folder=folder, plan=plan, success=success, on_error=on_error)
    results = watched(
        _run(work, missing, num_workers),
        total=sum(shard.episodes for shard in missing),
        what=f"rewriting {info['name']}, {len(missing)} of {len(shards)} shards",
    )
    kept, dropped, damaged = 0, 0, []
    for result in results:
        kept += result is _KEPT
        dropped += result is _DROPPED
        damaged += [result] if isinstance(result, str) else []
    is_complete = all((folder / shard.name).exists() for shard in shards)
    if is_complete:
        _complete(directory, folder, info, shards, plan, is_whole=success is None)
    return Outcome(folder, is_complete, kept, dropped, tuple(damaged))


@dataclass(frozen=True)
class Pictures:
    """How the pictures of one key are changed: from `before` to `after`, maybe flipped."""

    before: FeatureSpec
    after: FeatureSpec
    size: tuple[int, int] | None
    is_depth: bool
    flip: bool
    quality: int
    subsampling: str

    def __call__(self, feature: Feature) -> Value:
        """The list of an Example with its pictures changed; empty ones stay empty."""
        if feature.kind == "bytes":
            recode = self._recode if self.before.kind == "image" else self._repack
            return [recode(data) if data else data for data in feature.strings()]
        values = feature.floats() if feature.kind == "float" else feature.ints()
        if not len(values):
            return values  # an optional feature that is absent
        arrays = values.reshape(-1, *self.before.shape).astype(self.before.dtype)
        return np.stack([self._changed(array) for array in arrays]).ravel()

    def _changed(self, array: np.ndarray) -> np.ndarray:
        if self.size is not None and self.is_depth:
            planes = array.reshape(*array.shape[:2], -1)
            array = resize_depth(planes, self.size).reshape(*self.size, *array.shape[2:])
        elif self.size is not None:
            array = resize_image(array, self.size, kind="lanczos")
        return array[..., ::-1] if self.flip else array

    def _decode(self, data: bytes) -> np.ndarray:
        if self.before.dtype == "uint8" and self.before.shape[-1] == 3:
            return decode_image(data)
        array = decode_stored(data)
        if self.before.dtype == "float32" and array.shape[-1] == 4:
            array = array.view(np.float32)  # tfds stores the four bytes of a number as RGBA
        form = (str(array.dtype), array.shape[-1])
        if form != (self.before.dtype, self.before.shape[-1]):
            raise ValueError(
                f"expected {self.before.dtype} with {self.before.shape[-1]} channels, got "
                f"{array.dtype} {list(array.shape)}"
            )
        return array

    def _recode(self, data: bytes) -> bytes:
        array = np.ascontiguousarray(self._changed(self._decode(data)))
        encoding = self.after.encoding or ("png" if data.startswith(_PNG) else "jpeg")
        if array.dtype == np.uint8 and array.shape[-1] == 3:
            options = {"quality": self.quality, "subsampling": self.subsampling}
            return encode_image(array, encoding=encoding, **options)
        array = array.view(np.uint8) if array.dtype == np.float32 else array
        stream = io.BytesIO()
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        image.save(
            stream, encoding.upper(), **({"quality": self.quality} if encoding == "jpeg" else {})
        )
        return stream.getvalue()

    def _repack(self, data: bytes) -> bytes:
        is_zlib = self.before.encoding == "zlib"
        raw = zlib.decompress(data) if is_zlib else data
        array = self._changed(np.frombuffer(raw, self.before.dtype).reshape(self.before.shape))
        raw = np.ascontiguousarray(array).tobytes()
        return zlib.compress(raw) if is_zlib else raw


def plan_pictures(spec: DatasetSpec, changes: Changes) -> dict[str, Pictures]:
    """The keys of an Example whose lists change, and how."""
    leaves = {STEPS + key: leaf for key, leaf in spec.steps.items()} | dict(spec.episode)
    flipped = {full for name in changes.flip for full in _picture_keys(leaves, name)}
    plan = {}
    for key, leaf in leaves.items():
        is_depth = "depth" in key or leaf.dtype != "uint8"
        size = changes.size if _is_picture(key, leaf) else None
        after = leaf if size is None else _resized(leaf, size, is_depth)
        if after != leaf or key in flipped:
            if leaf.kind == "image":
                _expect_known_form(key, leaf)
            plan[key] = Pictures(
                before=leaf,
                after=after,
                size=size,
                is_depth=is_depth,
                flip=key in flipped,
                quality=changes.quality,
                subsampling=changes.subsampling,
            )
    return plan


def _is_picture(key: str, leaf: FeatureSpec) -> bool:
    """Images of any kind, and arrays that are pictures by their shape and type or name."""
    sides = leaf.shape[:2]
    if len(leaf.shape) not in (2, 3) or any(0 <= side < SMALLEST for side in sides):
        return False
    if leaf.kind == "tensor":
        is_colour = leaf.dtype == "uint8" and leaf.shape[2:] == (3,)
        return min(leaf.shape) > 0 and (is_colour or "depth" in key)
    return leaf.kind == "image"


def _resized(leaf: FeatureSpec, size: tuple[int, int], is_depth: bool) -> FeatureSpec:
    encoding = leaf.encoding
    if leaf.kind == "image":
        encoding = "png" if is_depth or leaf.shape[-1] == 4 else "jpeg"
        if leaf.shape[:2] == size and not leaf.encoding:
            encoding = ""  # of either kind, and of the right size: they stay as they are
    return replace(leaf, shape=(*size, *leaf.shape[2:]), encoding=encoding)


def _expect_known_form(key: str, leaf: FeatureSpec) -> None:
    known = {"uint8": (1, 3, 4), "uint16": (1,), "float32": (1,)}
    if leaf.shape[-1] not in known.get(leaf.dtype, ()):
        raise ValueError(
            f"{key}: expected pictures of uint8 with 1, 3 or 4 channels or of uint16 or float32 "
            f"with one, got {leaf.dtype} {list(leaf.shape)}"
        )


def _picture_keys(leaves: Mapping[str, FeatureSpec], name: str) -> list[str]:
    """The colour pictures that `name` means: a key below steps/, or its last word."""
    pictures = [k for k, s in leaves.items() if s.dtype == "uint8" and s.shape[2:] == (3,)]
    short = [k.removeprefix(STEPS) for k in pictures]
    found = [k for k, s in zip(pictures, short, strict=True) if name in (k, s, s.split("/")[-1])]
    if not found:
        raise unknown_key(name, short, where="this set, among its colour pictures,")
    return found


def _episode_key(spec: DatasetSpec, key: str, directory: Path) -> str:
    leaf = spec.episode.get(key)
    if leaf is None or leaf.kind != "tensor" or leaf.size != 1:
        flags = [k for k, s in spec.episode.items() if s.kind == "tensor" and s.size == 1]
        raise unknown_key(key, flags, where=f"{directory}, flags of episodes,")
    return key


def success_key(spec: DatasetSpec) -> str:
    """Where a set says whether an episode succeeded, by the usual names."""
    for key in SUCCESS_KEYS:
        if key in spec.episode:
            return key
    raise unknown_key("success", spec.episode, where="this set, among its features of episodes,")


def wrist_keys(spec: DatasetSpec) -> tuple[str, ...]:
    """The pictures of a camera on the hand, by the usual names."""
    found = [key for key in spec.steps if key.split("/")[-1] in WRIST_KEYS]
    if not found:
        raise unknown_key(WRIST_KEYS[0], spec.steps, where="this set, among its steps,")
    return tuple(found)


_KEPT, _DROPPED = True, False
_Result = bool | str  # of an episode: kept, dropped, or what is damaged


@dataclass(frozen=True)
class _Shard:
    path: Path
    split: str
    episodes: int  # as dataset_info.json counts them

    @property
    def name(self) -> str:
        return self.path.name


def _read_info(directory: Path) -> dict[str, Any]:
    path = directory / "dataset_info.json"
    info = read_json(path)
    for key in ("name", "version", "splits"):
        if not isinstance(info, dict) or key not in info:
            raise ValueError(f"{path}: expected {key!r}, got {list(info)}")
    return info


def _shards(directory: Path, info: Mapping[str, Any]) -> list[_Shard]:
    """The files of all splits, in order."""
    shards = []
    for split in info["splits"]:
        lengths = [int(n) for n in split["shardLengths"]]
        template = split.get("filepathTemplate") or _TEMPLATE
        for i, length in enumerate(lengths):
            words = {
                "DATASET": info["name"],
                "SPLIT": split["name"],
                "FILEFORMAT": info.get("fileFormat") or "tfrecord",
                "SHARD_X_OF_Y": f"{i:05d}-of-{len(lengths):05d}",
                "SHARD_INDEX": f"{i:05d}",
                "NUM_SHARDS": f"{len(lengths):05d}",
            }
            path = directory / template.format(**words)
            shards.append(_Shard(path, split["name"], length))
    missing = [shard.name for shard in shards if not shard.path.is_file()]
    if missing:
        raise ValueError(
            f"{directory}: expected {len(shards)} shards as dataset_info.json lists them, "
            f"{len(missing)} are missing: {', '.join(missing[:3])}"
        )
    return shards


def _agree(folder: Path, directory: Path, shards: Sequence[_Shard], changes: Changes) -> None:
    """Note what is being done, or compare with what an earlier run noted."""
    if folder == directory or directory in folder.parents:
        raise ValueError(f"expected a target apart from the source {directory}, got {folder}")
    plan = {
        "changes": asdict(changes),
        "source": str(directory),
        "sizes": {shard.name: shard.path.stat().st_size for shard in shards},
    }
    plan = json.loads(json.dumps(plan))
    path = folder / PLAN
    if not path.exists():
        if (folder / "dataset_info.json").exists():
            raise ValueError(f"{folder} holds a data set already; choose another target")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(plan, indent=2) + "\n")
        return
    earlier = read_json(path)
    for key in ("changes", "sizes"):
        if earlier.get(key) != plan[key]:
            then, now = earlier.get(key) or {}, plan[key]
            differing = [k for k in {**then, **now} if then.get(k) != now.get(k)]
            what = ", ".join(f"{k}: {then.get(k)} and {now.get(k)}" for k in differing[:3])
            raise ValueError(
                f"{folder} was begun with other {key} ({what}); delete it or choose another target"
            )


def _run(
    work: Callable[[_Shard], Iterator[_Result]], shards: Sequence[_Shard], num_workers: int | None
) -> Iterator[_Result]:
    """What became of every episode, as it happens."""
    workers = min(len(shards), (os.cpu_count() or 1) if num_workers is None else num_workers)
    if workers <= 1:
        for shard in shards:
            yield from work(shard)
        return
    # A server that has imported everything forks the workers: they start at once and share memory.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    results = context.SimpleQueue()
    pool = ProcessPoolExecutor(workers, context, initializer=_enter, initargs=(results,))
    try:
        rest = {pool.submit(_send, work, shard) for shard in shards}
        while rest:
            done, rest = wait(rest, timeout=0.1, return_when=FIRST_EXCEPTION)
            while not results.empty():  # what a worker sent is there before its shard is done
                yield results.get()
            for future in done:
                future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker was killed, for lack of memory perhaps; the same command goes on with the "
            "shards that are missing"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_results: Any = None  # of a worker: where it sends


def _enter(results: Any) -> None:
    global _results
    _results = results
    torch.set_num_threads(1)


def _send(work: Callable[[_Shard], Iterator[_Result]], shard: _Shard) -> None:
    for result in work(shard):
        _results.put(result)


def _rewrite_shard(
    shard: _Shard,
    *,
    folder: Path,
    plan: Mapping[str, Pictures],
    success: str | None,
    on_error: str,
) -> Iterator[_Result]:
    """Write one shard; yields what became of each of its episodes."""
    with _claimed(folder / f".{shard.name}.writing") as out:
        if (folder / shard.name).exists():
            return
        found = 0
        for offset, record in _records(shard.path, on_error):
            found += 1
            if isinstance(record, str):
                yield record
                continue
            try:
                changed = _change(record, plan, success)
            except (ValueError, zlib.error) as error:
                what = f"{shard.path}, record at offset {offset}: {error}"
                if on_error == "raise":
                    raise CorruptRecordError(what) from error
                yield what
                continue
            if changed is not None:
                out.write(record if changed is record else frame_record(changed))
            yield _DROPPED if changed is None else _KEPT
        if found != shard.episodes:
            what = (
                f"{shard.path}: expected {shard.episodes} episodes, as dataset_info.json counts "
                f"them, got {found}"
            )
            if on_error == "raise":
                raise CorruptRecordError(what)
            yield what
        out.flush()
        os.fsync(out.fileno())
        os.replace(out.name, folder / shard.name)


def _records(path: Path, on_error: str) -> Iterator[tuple[int, bytes | str]]:
    """Offset and content of each record, or what is wrong with it; forgets what was read."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view.madvise(mmap.MADV_SEQUENTIAL)
    buffer = memoryview(view)
    spans = scan_records(buffer, name=str(path))
    offset = length = 0
    while True:
        try:
            offset, length = next(spans)
            verify_record(buffer, offset, length, name=str(path))
            record: bytes | str = bytes(buffer[offset : offset + length])
        except StopIteration:
            return
        except CorruptRecordError as error:
            if on_error == "raise":
                raise
            record = str(error)  # behind a damaged header nothing is found
        yield offset, record
        view.madvise(mmap.MADV_DONTNEED, 0, (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE)


def _change(payload: bytes, plan: Mapping[str, Pictures], success: str | None) -> bytes | None:
    """The Example with its pictures changed; None if it is to be left out."""
    features = parse_example(payload)
    if success is not None:
        if success not in features:
            raise ValueError(f"expected {success!r}, got none")
        flag = features[success]
        if not (flag.floats() if flag.kind == "float" else flag.ints()).any():
            return None
    lists = {}
    for key, pictures in plan.items():
        if key not in features:
            continue
        try:
            lists[key] = pictures(features[key])
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{key}: {error}") from error
    return replace_features(payload, lists) if lists else payload


@contextmanager
def _claimed(path: Path) -> Iterator[BinaryIO]:
    """A file to write that no other process writes; it is gone afterwards if it was not renamed."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{path} is being written by another process") from error
        try:
            file.truncate(0)
            yield file
        finally:
            path.unlink(missing_ok=True)


def _complete(
    directory: Path,
    folder: Path,
    info: Mapping[str, Any],
    shards: Sequence[_Shard],
    plan: Mapping[str, Pictures],
    *,
    is_whole: bool,
) -> None:
    """Write what describes the set, dataset_info.json last."""
    for path in sorted(directory.iterdir()):
        is_stale = path.name == "episodes.json" and not is_whole
        is_kept = path.suffix in (".json", ".txt") and not path.name.startswith((".", *_OURS))
        if path.is_file() and is_kept and not is_stale:
            shutil.copyfile(path, folder / path.name)
    tree = _with_pictures(read_json(directory / "features.json"), "", plan)
    write_whole(folder / "features.json", json.dumps(tree, indent=4, sort_keys=True) + "\n")
    counted = []
    for split in info["splits"]:
        lengths, size = [], 0
        for shard in shards:
            if shard.split == split["name"]:
                spans = _spans(folder / shard.name)
                lengths.append(str(len(spans)))
                size += sum(length for _, length in spans)
        counted.append({**split, "numBytes": str(size), "shardLengths": lengths})
    content = json.dumps({**info, "splits": counted}, indent=2, sort_keys=True)
    write_whole(folder / "dataset_info.json", content + "\n")


def _spans(path: Path) -> list[tuple[int, int]]:
    if not path.stat().st_size:
        return []
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return list(scan_records(memoryview(view), name=str(path)))


def _with_pictures(node: Any, path: str, plan: Mapping[str, Pictures]) -> Any:
    """A node of features.json with the new shapes and encodings; all else as it was."""
    if "featuresDict" in node:
        below = {
            name: _with_pictures(child, f"{path}/{name}" if path else name, plan)
            for name, child in node["featuresDict"].get("features", {}).items()
        }
        return {**node, "featuresDict": {**node["featuresDict"], "features": below}}
    if "sequence" in node and path == STEPS.rstrip("/"):
        below = _with_pictures(node["sequence"]["feature"], path, plan)
        return {**node, "sequence": {**node["sequence"], "feature": below}}
    if path not in plan:
        return node
    after = plan[path].after
    body = {**node[after.kind], "shape": {"dimensions": [str(side) for side in after.shape]}}
    if after.kind == "image" and after.encoding:
        body["encodingFormat"] = after.encoding
    return {**node, after.kind: body}
