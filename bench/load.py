"""Time and memory of loading and converting published checkpoints: `python -m bench.load`.

Makes a checkpoint of full size in each format, loads and converts it and acts once with it, in a
process each, and deletes it again: needs 20 GB of disk and, for float32, 18 GB of memory. Peak
memory is the largest resident set, as a part of the checkpoint's size on disk; the goal for loading
and converting is below 1.25.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import full_size, report
from pizero.agent.weights import inspect, load_model
from pizero.agent.weights.export import export

GOAL = 1.25
ACT = ("act bf16", "act fp32")
# format, kind, stored dtype, what is done with it
CASES = {
    "openpi pi0": ("openpi", "pi0", "bf16", ("load", "pizero", "lerobot", *ACT)),
    "openpi pi05": ("openpi", "pi05", "bf16", ("load", ACT[0])),
    "lerobot pi0": ("lerobot", "pi0", "bf16", ("load", "openpi", ACT[0])),
    "giga pi0": ("giga", "pi0", "bf16", ("load", ACT[0])),
    "transformers pi0": ("transformers", "pi0", "bf16", ("load", ACT[0])),
    "open-pi-zero": ("open_pi_zero", "pi0", "bf16", ("load", "pizero", *ACT)),
    "orbax pi0": ("orbax", "pi0", "fp32", ("load", "openpi", ACT[1])),
}
SMALL = full_size.Sizes(
    vlm=full_size.Transformer(64, 2, 96),
    expert=full_size.Transformer(32, 2, 48),
    vision=full_size.Transformer(72, 2, 48, heads=1, head_dim=72),
    patches=16,
    vocabulary=512,
    state=7,
    action=7,
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--jobs", nargs="+", default=None, help="those of them only")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are made")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "load.json")
    parser.add_argument("--job", nargs=3, default=None, help=argparse.SUPPRESS)  # see _in_a_process
    options = parser.parse_args(arguments)
    if options.job is not None:
        job, path, out = options.job
        print(json.dumps(_job(job, Path(path), Path(out))))
        return 0
    result = run(options)
    print_result(result)
    report.write_json(options.out, result)
    print(f"wrote {options.out}")
    # How much memory acting takes depends on the precision, and not on how it was loaded.
    within = [r["of_disk"] < GOAL for r in result["rows"] if r["to"] not in ACT]
    return 0 if options.size == "small" or all(within) else 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for case in options.cases:
            rows += _measure(case, Path(folder) / "checkpoint", options.size, options.jobs)
    return {
        "benchmark": "load",
        "size": options.size,
        "device": report.device_name(torch.device("cpu")),
        "goal": GOAL,
        "versions": report.versions(),
        "rows": rows,
    }


def print_result(result: dict[str, Any]) -> None:
    report.show(
        f"loading and converting, {result['size']} size, {result['device']}",
        (
            *("checkpoint", "to", "disk GB", "s", "raw read s"),
            *("act s", "peak GB", "of disk", "with imports"),
        ),
        [
            (
                row["case"],
                row["to"],
                f"{row['disk_gb']:.2f}",
                f"{row['seconds']:.1f}",
                f"{row['raw_read_seconds']:.1f}",
                f"{row['act_seconds']:.1f}" if "act_seconds" in row else "",
                f"{row['peak_gb']:.2f}",
                f"{row['of_disk']:.2f}",
                f"{row['of_disk_with_imports']:.2f}",
            )
            for row in result["rows"]
        ],
    )


def _measure(
    case: str, folder: Path, size: str, chosen: Sequence[str] | None
) -> list[dict[str, Any]]:
    format, kind, dtype, jobs = CASES[case]
    jobs = [job for job in jobs if chosen is None or job in chosen]
    # In a process of its own too: what it allocated and freed may stay with it.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        path = pool.submit(
            full_size.write_checkpoint,
            format,
            folder,
            kind=kind,
            dtype=full_size.DTYPES[dtype],
            sizes=SMALL if size == "small" else None,
        ).result()
    rows = []
    try:
        disk = full_size.disk_size(path)
        raw = _raw_read(path)
        for job in jobs:
            _forget(path)
            done = _in_a_process(job, path, folder.with_name("converted"))
            shutil.rmtree(folder.with_name("converted"), ignore_errors=True)
            rows.append(
                {
                    "case": case,
                    "to": "memory" if job == "load" else job,
                    "disk_gb": disk / 1e9,
                    "seconds": done["seconds"],
                    "raw_read_seconds": raw,
                    "imports_gb": done["before"] / 1e9,
                    "peak_gb": done["peak"] / 1e9,
                    "of_disk": (done["peak"] - done["before"]) / disk,
                    "of_disk_with_imports": done["peak"] / disk,
                }
                | ({"act_seconds": done["act_seconds"]} if "act_seconds" in done else {})
            )
    finally:
        shutil.rmtree(folder)
    return rows


def _in_a_process(job: str, path: Path, out: Path) -> dict[str, Any]:
    command = (sys.executable, "-m", "bench.load", "--job", job, str(path), str(out))
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _job(job: str, path: Path, out: Path) -> dict[str, Any]:
    """Load, act, or convert to the layout called `job`; what the process was before and came to."""
    if job in ACT:
        return _act(path, full_size.DTYPES[job.removeprefix("act ")], out)
    before, started = _resident("VmRSS"), time.perf_counter()
    kept = load_model(path) if job == "load" else export(inspect(path), out, to=job)
    seconds, peak = time.perf_counter() - started, _resident("VmHWM")
    del kept
    return {"seconds": seconds, "before": before, "peak": peak}


def _act(path: Path, dtype: torch.dtype, scratch: Path) -> dict[str, Any]:
    """A whole policy is loaded and asked for one chunk: three cameras or, in open-pi-zero, one."""
    from pizero import load_policy
    from pizero.data import train_tokenizer

    scratch.mkdir()
    words = train_tokenizer(["open the drawer"], scratch / "tokenizer.model", vocab_size=300)
    statistics = scratch / "norm_stats.json"
    numbers = dict.fromkeys(("mean", "q01"), -1.0) | dict.fromkeys(("std", "q99"), 1.0)
    before, started = _resident("VmRSS"), time.perf_counter()
    found = inspect(path)
    forward = found.layout == "open_pi_zero"
    group = {name: [value] * found.model["action_dim"] for name, value in numbers.items()}
    statistics.write_text(json.dumps({"norm_stats": {"state": group, "actions": group}}))
    policy = load_policy(
        path,
        robot="widowx" if forward else None,
        statistics=None if forward else statistics,
        tokenizer=words,
        device="cpu",
        dtype=dtype,
    )
    loaded = time.perf_counter()
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    chunk = policy.act(
        images=dict.fromkeys(policy.pipeline.cameras, picture),
        text="open the drawer",
        state=np.full(policy.pipeline.robot_state_dim, 0.5),
    )
    ended, peak = time.perf_counter(), _resident("VmHWM")
    shutil.rmtree(scratch)
    if chunk.shape[0] != policy.model.horizon or not np.isfinite(chunk).all():
        raise RuntimeError(f"{path} acts wrongly: {chunk.shape}")
    times = {"seconds": loaded - started, "act_seconds": ended - loaded}
    return {**times, "before": before, "peak": peak}


def _resident(field: str) -> int:
    """Resident bytes, now or at most. getrusage's maximum would begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _raw_read(path: Path) -> float:
    """Seconds that it takes to read all bytes and do nothing with them."""
    _forget(path)
    buffer = bytearray(1 << 26)
    started = time.perf_counter()
    for file in _files(path):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started


def _forget(path: Path) -> None:
    """Drop the files from the system's cache, so that reading them means the disk."""
    for file in _files(path):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]


if __name__ == "__main__":
    raise SystemExit(main())
