"""What a data set is on disk: format, splits, bytes, cameras, and everything that it stores."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pizero.agent.report.dataset_look import Look
from pizero.agent.report.dataset_pictures import CameraProbe, Probes
from pizero.agent.report.page import facts, section, table
from pizero.agent.sources import INFO, Source
from pizero.data.oxe import oxe_set
from pizero.data.rlds.spec import DatasetSpec, FeatureSpec

_SHARD = re.compile(r".+-(?P<split>[^-]+)\.tfrecord")


@dataclass(frozen=True)
class OnDisk:
    """The files of a data set. `splits`: name -> (episodes or None, files, bytes)."""

    format: str
    splits: Mapping[str, tuple[int | None, int, int]]
    size: int  # bytes of all
    features: tuple[tuple[str, str, str, str], ...]  # key, kind, shape, type
    more: tuple[tuple[str, str], ...] = ()


def on_disk(directory: Path) -> OnDisk:
    """Read what the folder says of itself; sizes are those of the files."""
    return _lerobot(directory) if (directory / INFO).is_file() else _rlds(directory)


def fact_section(look: Look, disk: OnDisk, probes: Probes) -> str:
    """Files, cameras, the keys that are read and how they were found, and all others."""
    source = look.source
    data = source.dataset
    files = [
        ("format", disk.format),
        ("folder", data.index.directory),
        ("split", data.split),
        *disk.more,
        ("robot", source.robot.name if source.robot else "not known; name it with --robot"),
        ("control rate", f"{source.fps:g} Hz" if source.fps else "not known; give it with --fps"),
    ]
    if _is_registered(source):
        files.append(("Open X-Embodiment", "registered; --root shows it standardised"))
    how = [
        (what, f"{_joined(keys) or 'none'} ({found})")
        for what, (keys, found) in source.keys.items()
        if what != "cameras"
    ]
    cameras = [
        (name, f"{_joined(data.cameras[name])}, {_sizes(probe)}")
        for name, probe in probes.cameras.items()
    ]
    found = source.keys["cameras"][1]
    lists = facts("Files", files) + facts("Read as", how) + facts(f"Cameras ({found})", cameras)
    rows = [
        [
            ("name", escape(name) + (" (shown here)" if name == data.split.split("[")[0] else "")),
            ("number", "" if episodes is None else f"{episodes:,}"),
            ("number", f"{count:,}"),
            ("number", size_words(size)),
        ]
        for name, (episodes, count, size) in disk.splits.items()
    ]
    head = [("", "split"), ("number", "episodes"), ("number", "files"), ("number", "size")]
    keys = table(
        [("", "key"), ("", "kind"), ("", "shape"), ("", "type")],
        [
            [("name", escape(key)), ("", kind), ("quiet", shape), ("quiet", dtype)]
            for key, kind, shape, dtype in disk.features
        ],
    )
    return section(
        "What is on disk",
        f'<div class="facts">{lists}</div><h3>Splits</h3>{table(head, rows)}',
        f"<details><summary>All {len(disk.features)} keys</summary>{keys}</details>",
    )


def size_words(size: float) -> str:
    """Bytes in a unit that people read."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _rlds(directory: Path) -> OnDisk:
    spec = DatasetSpec.load(directory / "features.json")
    info = _json(directory / "dataset_info.json")
    shards: dict[str, list[int]] = {}
    for path in sorted(directory.iterdir()):
        if match := _SHARD.match(path.name):
            shards.setdefault(match["split"], []).append(path.stat().st_size)
    episodes = {s["name"]: sum(map(int, s["shardLengths"])) for s in info.get("splits", [])}
    features = [(f"steps/{key}", *_feature(f)) for key, f in spec.steps.items()]
    features += [(key, *_feature(f)) for key, f in spec.episode.items()]
    version = f", {info['name']} {info['version']}" if {"name", "version"} <= info.keys() else ""
    return OnDisk(
        format=f"RLDS (TFRecord){version}",
        splits={name: (episodes.get(name), len(s), sum(s)) for name, s in shards.items()},
        size=sum(map(sum, shards.values())),
        features=tuple(features),
    )


def _lerobot(directory: Path) -> OnDisk:
    info = _json(directory / INFO)
    files = [path for path in sorted(directory.rglob("*")) if path.suffix in (".parquet", ".mp4")]
    sizes = (len(files), sum(path.stat().st_size for path in files))
    splits = {}
    for name, span in info.get("splits", {}).items():
        first, _, end = str(span).partition(":")
        whole = first.isdigit() and end.isdigit()
        # All splits lie in the same files.
        splits[name] = (int(end) - int(first) if whole else None, *sizes)
    features = []
    for key, feature in info["features"].items():
        shape = " x ".join(map(str, feature.get("shape", ())))
        said = feature.get("info") or feature.get("video_info") or {}
        codec = said.get("video.codec")
        features.append((key, *_lerobot_kind(feature["dtype"]), shape, codec))
    more = [("frames", f"{info.get('total_frames', 0):,}")]
    if info.get("robot_type"):
        more.append(("recorded with", str(info["robot_type"])))
    return OnDisk(
        format=f"LeRobot {info['codebase_version']}",
        splits=splits,
        size=sizes[1],
        features=tuple(
            (k, kind, shape, codec or dtype) for k, kind, dtype, shape, codec in features
        ),
        more=tuple(more),
    )


def _lerobot_kind(dtype: str) -> tuple[str, str]:
    kinds = {"video": "video", "image": "image", "string": "text"}
    return kinds.get(dtype, "tensor"), dtype


def _feature(feature: FeatureSpec) -> tuple[str, str, str]:
    shape = " x ".join("any" if n < 0 else str(n) for n in feature.shape)
    encoding = "" if feature.encoding in ("none", "") else f", {feature.encoding}"
    return feature.kind, shape, feature.dtype + encoding


def _is_registered(source: Source) -> bool:
    """Whether a set whose keys are guessed has a standardisation that was not asked for."""
    try:
        oxe_set(source.name)
    except ValueError:
        return False
    return source.keys.get("action", (None, ""))[1] == "guessed"


def _sizes(probe: CameraProbe) -> str:
    return ", ".join(f"{w} x {h}" for h, w in probe.sizes) or "no picture"


def _joined(keys: Any) -> str:
    return "" if keys is None else keys if isinstance(keys, str) else " + ".join(map(str, keys))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
