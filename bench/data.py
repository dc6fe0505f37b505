"""What reading data costs: `python -m bench.data --folder /big/disk`.

Writes a synthetic set like bridge_dataset once (about 20,000 frames, JPEG of 256 x 256 and 25 KB;
and smaller ones for other sizes and formats), then lets readers take turns on it, each time in a
process of its own. Compared are processor milliseconds per frame, of all processes together: unlike
frames per second they hardly depend on what else the machine does. Exit code 1 if a goal is missed.

TensorFlow and LeRobot take part where they can be imported; `--python tensorflow=...` names another
interpreter that can.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench import report
from bench.data_jobs import BATCH, HORIZON, KEYS

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pizero" / "bench-data"
FIRST_BATCH_S, RESIDENT_MB, GROWTH_MB = 2.0, 300.0, 1.0  # growth in 10,000 frames
CAMERAS = ("image_0", "image_1")  # of the LeRobot set


@dataclass(frozen=True)
class Arm:
    """One way to read: `goal` is CPU-ms per picture, `job` what differs from `_job`."""

    name: str
    data: str  # one of SETS
    job: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    pictures: int = 1  # in a frame
    goal: float | None = None
    needs: str | None = None  # a package


@dataclass(frozen=True)
class Size:
    """Episodes of the sets, frames of a measurement, and how often each is made."""

    episodes: int
    frames: int
    warm_up: int
    rounds: int
    long: int  # frames of the measurement of memory
    model: int  # pixels that the model sees
    stored: int | None = None  # pixels of the set; None: as published


SIZES = {
    "full": Size(episodes=500, frames=2000, warm_up=400, rounds=5, long=40_000, model=224),
    "small": Size(
        episodes=6, frames=2 * BATCH, warm_up=BATCH, rounds=1, long=4 * BATCH, model=16, stored=32
    ),
}
LOADER = {"reader": "loader"}
ARMS = (
    Arm("lanczos", "bridge", LOADER, goal=1.4),
    Arm("bicubic", "bridge", LOADER | {"resize": "bicubic"}, goal=0.8),
    Arm("no resize", "bridge_224", LOADER, goal=0.35),
    Arm("lanczos, windowed", "bridge", LOADER | {"order": "windowed"}),
    Arm("lanczos, 2 workers", "bridge", LOADER | {"workers": 2}),
    Arm("bicubic, 2 workers", "bridge", LOADER | {"workers": 2, "resize": "bicubic"}),
    Arm("bicubic, 2 ranks", "bridge", LOADER | {"resize": "bicubic"}, ranks=2),
    Arm("lanczos, without pipeline", "bridge", goal=1.4),
    Arm("bicubic, without pipeline", "bridge", {"resize": "bicubic"}, goal=0.8),
    Arm("no resize, without pipeline", "bridge_224", goal=0.35),
    Arm("tf.data, lanczos", "bridge", {"reader": "tensorflow"}, needs="tensorflow"),
    Arm("LeRobot v3.0, 2 x AV1", "lerobot", LOADER, goal=0.7, pictures=2, needs="av"),
    Arm("LeRobot v3.0, without pipeline", "lerobot", goal=0.7, pictures=2, needs="av"),
    Arm(
        "LeRobot's own reader, 2 x AV1",
        "lerobot",
        {"reader": "theirs"},
        pictures=2,
        needs="lerobot",
    ),
)
LONG = Arm("memory: lanczos", "bridge", LOADER)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("--folder", type=Path, default=CACHE, help="where the sets are kept, 3 GB")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--only", nargs="+", metavar="PART", help="arms named so in part")
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="PACKAGE=INTERPRETER",
        help="interpreters that can import tensorflow or lerobot",
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS / "data.json")
    options = parser.parse_args(arguments)
    result = run(options)
    print_result(result)
    report.write_json(options.out, result)
    print(f"wrote {options.out}")
    missed = [goal for goal in result["goals"] if not goal["ok"]]
    return 0 if options.size == "small" or not missed else 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    size = SIZES[options.size]
    rounds = size.rounds if options.rounds is None else options.rounds
    pythons = dict(entry.split("=", 1) for entry in options.python)
    arms = [a for a in ARMS if not options.only or any(part in a.name for part in options.only)]
    packages = {name: _look_for(name, pythons) for a in arms if (name := a.needs) is not None}
    absent = {a.name: packages[a.needs][1] for a in arms if a.needs and packages[a.needs][1]}
    arms = [a for a in arms if a.name not in absent]
    sets = Sets(options.folder / options.size, size)
    for name in dict.fromkeys(a.data for a in (*arms, LONG)):
        sets.path(name)
    measured: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    prepared: dict[str, list[dict[str, Any]]] = {"index": [], "statistics": []}
    turns = random.Random(0)
    for _ in range(rounds):
        for arm in turns.sample(arms, len(arms)):
            measured[arm.name].append(_read(arm, sets, size, pythons))
        for what, found in prepared.items():
            found.append(_prepare(what, sets))
    memory = _read(LONG, sets, size, pythons, frames=size.long, every=max(size.long // 20, BATCH))
    rows = [_row(arm, measured[arm.name]) for arm in arms]
    result = {
        "benchmark": "data",
        "size": options.size,
        "rounds": rounds,
        "device": report.device_name(torch.device("cpu")),
        "versions": report.versions() | {name: found for name, (found, _) in packages.items()},
        "frames of the set": sets.frames("bridge"),
        "rows": rows,
        "absent": absent,
        "index": report.spread([1e6 * f["cpu_s"] / f["frames"] for f in prepared["index"]]),
        "statistics": report.spread(
            [1e6 * f["cpu_s"] / f["frames"] for f in prepared["statistics"]]
        ),
        "memory": _memory(memory["memory"]),
    }
    return result | {"goals": _goals(rows, result["memory"])}


def print_result(result: dict[str, Any]) -> None:
    first = result["rows"][0] if result["rows"] else None
    report.show(
        f"reading, {result['frames of the set']} frames, {result['device']}, "
        f"{result['rounds']} rounds",
        ("reader", "CPU-ms", "iqr", "of first", "frames/s", "first batch s", "MB", "all MB"),
        [
            (
                row["name"],
                f"{row['cpu_ms']['median']:.3f}",
                f"{row['cpu_ms']['iqr']:.3f}",
                f"{row['cpu_ms']['median'] / first['cpu_ms']['median']:.2f}" if first else "",
                f"{row['frames_per_s']:.0f}",
                f"{row['first_batch_s']['least']:.1f} ({row['first_cpu_s']:.1f} CPU)",
                f"{row['resident_mb']:.0f}",
                f"{row['resident_all_mb']:.0f}",
            )
            for row in result["rows"]
        ],
    )
    for name, why in result["absent"].items():
        print(f"left out: {name}: {why}")
    memory = result["memory"]
    print(
        f"index: {result['index']['median']:.1f} CPU-us per frame, all checksums verified; "
        f"statistics: {result['statistics']['median']:.2f} CPU-s per million frames\n"
        f"memory over {memory['frames']} frames in global order: {memory['typical_mb']:.0f} MB, "
        f"at most {memory['most_mb']:.0f}, {memory['growth_mb']:+.2f} MB in 10,000 frames"
    )
    report.show(
        "goals",
        ("goal", "", "measured", "at most"),
        [
            (g["name"], "ok" if g["ok"] else "MISSED", f"{g['got']:.2f}", f"{g['limit']:.2f}")
            for g in result["goals"]
        ],
    )


# The sets -----------------------------------------------------------------------------------------


class Sets:
    """Synthetic sets below a folder, written when first asked for."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        self._paths: dict[str, Path] = {}

    def path(self, name: str) -> Path:
        if name not in self._paths:
            print(f"data set {name} in {self.folder}", flush=True)
            self._paths[name] = getattr(self, f"_{name}")()
        return self._paths[name]

    def frames(self, name: str) -> int:
        from pizero.data.rlds import open_index

        return int(open_index(self.path(name), "train").lengths.sum())

    def assets(self) -> Path:
        """Tokenizer and statistics of the bridge set; the others are near enough."""
        from pizero.data import RldsDataset, compute_statistics, save_statistics, train_tokenizer

        folder = self.folder / "assets"
        if not (folder / "stats.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            path = self.path("bridge")
            dataset = RldsDataset(path=path, split="train", cameras={}, horizon=HORIZON, **KEYS)
            texts = sorted(set(dataset.texts()) - {""})
            train_tokenizer(texts, folder / "tokenizer.model", vocab_size=320)
            save_statistics(compute_statistics(dataset), folder / "stats.json")
        return folder

    def _bridge(self) -> Path:
        return self._write("bridge", self.size.episodes, self.size.stored)

    def _bridge_224(self) -> Path:
        """As `scripts/resize_rlds.py` leaves it: nothing is left to resize."""
        return self._write("bridge_224", max(4, self.size.episodes // 5), self.size.model)

    def _write(self, name: str, episodes: int, image: int | None) -> Path:
        from pizero.data.rlds.synthetic import write_synthetic

        return write_synthetic(
            self.folder / name,
            "bridge_dataset",
            episodes={"train": episodes},
            image_size=None if image is None else (image, image),
            steps=(25, 55),
            shards=max(1, min(16, episodes // 4)),
        )

    def _lerobot(self) -> Path:
        """Two cameras as AV1, a key frame every other picture, as LeRobot records."""
        from pizero.data import FeatureSpec, RldsDataset
        from pizero.data.lerobot import export_episodes
        from pizero.data.rlds import DatasetSpec
        from pizero.data.rlds.synthetic import write_synthetic

        path, pixels = self.folder / "lerobot", max(64, self.size.model)
        if path.exists():
            return path
        image = FeatureSpec.image(pixels, pixels, encoding="png")
        features = {
            **{f"steps/observation/{camera}": image for camera in CAMERAS},
            "steps/observation/state": FeatureSpec.tensor([7]),
            "steps/action": FeatureSpec.tensor([7]),
            "steps/language_instruction": FeatureSpec.text(),
            "steps/is_first": FeatureSpec.scalar("bool"),
        }
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            spec = Path(folder) / "two_cameras" / "features.json"
            spec.parent.mkdir()
            spec.write_text(json.dumps(DatasetSpec.from_flat(features).to_json()))
            episodes = {"train": max(4, self.size.episodes // 8)}
            source = RldsDataset(
                path=write_synthetic(Path(folder) / "rlds", spec, episodes=episodes),
                split="train",
                cameras={camera: f"observation/{camera}" for camera in CAMERAS},
                horizon=1,
                **KEYS,
            )
            return export_episodes({"train": source}, path, fps=10)


# Measurements -------------------------------------------------------------------------------------


def _look_for(package: str, pythons: dict[str, str]) -> tuple[str | None, str | None]:
    """Its version, or the reason why it cannot be imported."""
    command = f"import {package}; print(getattr({package}, '__version__', 'unknown'))"
    done = subprocess.run(
        (pythons.get(package, sys.executable), "-c", command),
        capture_output=True,
        text=True,
        env=_environment(),
    )
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1]
    return done.stdout.splitlines()[-1], None


def _environment() -> dict[str, str]:
    threads = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    return {**os.environ, **dict.fromkeys(threads, "1"), "TF_CPP_MIN_LOG_LEVEL": "3"}


def _read(
    arm: Arm,
    sets: Sets,
    size: Size,
    pythons: dict[str, str],
    *,
    frames: int | None = None,
    every: int = 0,
) -> dict[str, Any]:
    """Run an arm once, all its ranks at the same time."""
    job = {
        "what": "read",
        "reader": "plain",
        "format": "lerobot" if arm.data == "lerobot" else "rlds",
        "path": str(sets.path(arm.data)),
        "assets": str(sets.assets()),
        "cameras": list(CAMERAS),
        "size": size.model,
        "resize": "lanczos",
        "workers": 0,
        "world_size": arm.ranks,
        "order": "global",
        "buffer": 10_000,
        "warm_up": size.warm_up,
        "frames": size.frames if frames is None else frames,
        "every": every,
    }
    python = pythons.get(arm.needs or "", sys.executable)
    jobs = [job | arm.job | {"rank": rank, "started": time.time()} for rank in range(arm.ranks)]
    found = list(_finish([_start(python, j) for j in jobs]))
    return {
        "frames": sum(f["frames"] for f in found),
        "cpu_s": sum(f["cpu_s"] for f in found),
        "wall_s": max(f["wall_s"] for f in found),
        "first_batch_s": max(f["first_batch_s"] for f in found),
        "first_cpu_s": max(f["first_cpu_s"] for f in found),
        "memory": found[0]["memory"],
        "ranks_mb": sum(f["memory"][-1][2] for f in found),
    }


def _prepare(what: str, sets: Sets) -> dict[str, Any]:
    job = {"what": what, "path": str(sets.path("bridge")), "options": {}, "repeat": 5}
    return next(_finish([_start(sys.executable, job)]))


def _start(python: str, job: dict[str, Any]) -> subprocess.Popen[str]:
    command = (python, "-m", "bench.data_jobs", json.dumps(job))
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=_environment()
    )


def _finish(started: Iterable[subprocess.Popen[str]]) -> Iterator[dict[str, Any]]:
    for process in started:
        out, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{process.args} failed:\n{errors[-3000:]}")
        yield json.loads(out.splitlines()[-1])


def _row(arm: Arm, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = [f["first_batch_s"] for f in found]
    return {
        "name": arm.name,
        "pictures": arm.pictures,
        "goal": arm.goal,
        "cpu_ms": report.spread([1e3 * f["cpu_s"] / f["frames"] for f in found]),
        "frames_per_s": median(f["frames"] / f["wall_s"] for f in found),
        "first_batch_s": report.spread(first) | {"least": min(first)},
        "first_cpu_s": median(f["first_cpu_s"] for f in found),
        "resident_mb": median(f["memory"][-1][1] for f in found),
        "resident_all_mb": median(f["ranks_mb"] for f in found),
    }


def _memory(points: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How resident memory grows: the median of the slopes between all points but the first tenth.

    Pages that the system takes away and gives back make single points useless.
    """
    frames, own, _ = np.array(points, float).T
    late = slice(len(frames) // 10, None)
    first, second = np.triu_indices(len(frames[late]), 1)
    rise = (own[late][second] - own[late][first]) / (frames[late][second] - frames[late][first])
    return {
        "frames": int(frames[-1]),
        "typical_mb": float(np.median(own)),
        "most_mb": float(own.max()),
        "growth_mb": float(1e4 * np.median(rise)) if len(rise) else 0.0,
        "points": [list(p) for p in points],
    }


def _goals(rows: Sequence[dict[str, Any]], memory: dict[str, Any]) -> list[dict[str, Any]]:
    found = [
        (f"{r['name']}: CPU-ms per picture", r["cpu_ms"]["median"] / r["pictures"], r["goal"])
        for r in rows
        if r["goal"] is not None
    ]
    # Time on the clock is the least of the rounds: others use the machine too.
    ours = [row["first_batch_s"]["least"] for row in rows if row["name"] == "lanczos"]
    found += [("first batch, s after the start", s, FIRST_BATCH_S) for s in ours]
    found.append(("resident MB in global order", memory["typical_mb"], RESIDENT_MB))
    found.append(("growth, MB in 10,000 frames", memory["growth_mb"], GROWTH_MB))
    return [{"name": n, "got": got, "limit": limit, "ok": got <= limit} for n, got, limit in found]


if __name__ == "__main__":
    raise SystemExit(main())
