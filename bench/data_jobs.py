"""What `bench.data` measures, one job in a process of its own: `python -m bench.data_jobs JSON`.

A job that reads goes through frames by one of the `READERS` and says what they cost after a
warm-up: processor time of the process and all that it started, time on the clock, resident memory.
Imports are inside the functions, so that a process pays for what it uses only.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

BATCH = 32
HORIZON = 4
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
KEYS: dict[str, Any] = {
    "action": "action",
    "state": "observation/state",
    "text": "language_instruction",
}

Job = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    (text,) = sys.argv[1:] if arguments is None else arguments
    job = json.loads(text)
    print(json.dumps(JOBS[job["what"]](job)))
    return 0


def read(job: Job) -> dict[str, Any]:
    """Go through `warm_up` and then `frames` frames; with `every`, note the memory as often."""
    batches = READERS[job["reader"]](job)
    seen = next(batches)
    first_batch, first_cpu = time.time() - job["started"], processor_seconds()
    while seen < job["warm_up"]:
        seen += next(batches)
    cpu, wall, done = processor_seconds(), time.perf_counter(), 0
    memory: list[tuple[int, float, float]] = []
    while done < job["frames"]:
        done += next(batches)
        if job["every"] and done // job["every"] > len(memory):
            memory.append((done, *resident()))
    cpu, wall = processor_seconds() - cpu, time.perf_counter() - wall
    found = {
        "frames": done,
        "cpu_s": cpu,
        "wall_s": wall,
        "first_batch_s": first_batch,
        "first_cpu_s": first_cpu,
        "memory": memory or [(done, *resident())],
    }
    del batches  # ends the workers
    gc.collect()
    return found


def make_index(job: Job) -> dict[str, Any]:
    """Index the training split anew, by this process alone."""
    from pizero.data.rlds import open_index

    shutil.rmtree(Path(job["path"]) / ".pizero_index", ignore_errors=True)
    cpu, wall = time.process_time(), time.perf_counter()
    index = open_index(job["path"], "train", num_workers=0, **job["options"])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"frames": int(index.lengths.sum()), "cpu_s": cpu, "wall_s": wall}


def statistics(job: Job) -> dict[str, Any]:
    """Exact statistics of states and actions, `repeat` times the set, as one of that size."""
    from pizero.data import compute_statistics

    dataset = _rlds(job)
    len(dataset.states)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(job["repeat"]):
        compute_statistics(dataset)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"frames": len(dataset) * job["repeat"], "cpu_s": cpu, "wall_s": wall}


# Readers: each yields the frames of a batch, without end ------------------------------------------


def plain(job: Job) -> Iterator[int]:
    """Samples in a global order, resized and stacked: what no loader can do without."""
    import numpy as np
    import torch

    from pizero.data import Mix, resize_image

    torch.set_num_threads(1)
    dataset = _lerobot(job) if job["format"] == "lerobot" else _rlds(job)
    mix = Mix(datasets={"data": dataset})
    order, size, kind = mix.order(0), (job["size"], job["size"]), job["resize"]
    first = 0
    while True:
        _, frames = mix.locate(order, np.arange(first, first + BATCH))
        samples = [dataset.read(i) for i in frames.tolist()]
        batch = {
            "images": np.stack(
                [resize_image(x, size, kind=kind) for s in samples for x in s["images"].values()]
            ),
            **{key: np.stack([s[key] for s in samples]) for key in ("state", "actions")},
            "text": [s["text"] for s in samples],
        }
        yield len(batch["state"])
        first += BATCH


def loader(job: Job) -> Iterator[int]:
    """Batches as the trainer gets them: tokens, normalised states and actions, padding, masks."""
    import torch

    from pizero.data import PolicyPipeline, TrainLoader

    torch.set_num_threads(1)
    dataset = _lerobot(job) if job["format"] == "lerobot" else _rlds(job)
    assets = Path(job["assets"])
    pipeline = PolicyPipeline(
        cameras=list(dataset.cameras),
        image_size=(job["size"], job["size"]),
        resize=job["resize"],
        tokenizer=assets / "tokenizer.model",
        statistics=assets / "stats.json",
        normalization={"state": "z_score", "action": "z_score"},
        max_tokens=20,
        horizon=HORIZON,
        action_dim=7,
        state_dim=7,
    )
    batches = TrainLoader(
        dataset=dataset,
        pipeline=pipeline,
        seed=0,
        global_batch_size=BATCH * job["world_size"],
        rank=job["rank"],
        world_size=job["world_size"],
        num_workers=job["workers"],
        order=job["order"],
    )
    for batch in batches:
        yield len(batch.actions)


def tensorflow(job: Job) -> Iterator[int]:
    """The same samples streamed by tf.data, decoded and resized there, stacked here."""
    import numpy as np

    from pizero.data.rlds.tfdata import TfMix

    mix = TfMix(datasets={"data": _rlds(job)}, shuffle_buffer=job["buffer"])
    size = (job["size"], job["size"])
    samples = mix.samples(seed=0, image_size=size, threads=1)
    while True:
        batch = [next(samples) for _ in range(BATCH)]
        for key in ("state", "actions"):
            np.stack([sample[key] for sample in batch])
        np.stack([image for sample in batch for image in sample["images"].values()])
        yield BATCH


def theirs(job: Job) -> Iterator[int]:
    """LeRobot's own reader and PyTorch's loader, shuffled, with the same chunk of actions."""
    import torch

    reader: Any = import_module("lerobot.datasets.lerobot_dataset")
    torch.set_num_threads(1)
    root = Path(job["path"])
    fps = json.loads((root / "meta" / "info.json").read_text())["fps"]
    dataset = reader.LeRobotDataset(
        root.name, root=root, delta_timestamps={"action": [i / fps for i in range(HORIZON)]}
    )
    generator = torch.Generator().manual_seed(0)
    while True:
        for batch in torch.utils.data.DataLoader(
            dataset,
            batch_size=BATCH,
            shuffle=True,
            generator=generator,
            drop_last=True,
            num_workers=job["workers"],
        ):
            yield len(batch["action"])


READERS: dict[str, Callable[[Job], Iterator[int]]] = {
    "plain": plain,
    "loader": loader,
    "tensorflow": tensorflow,
    "theirs": theirs,
}
JOBS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "read": read,
    "index": make_index,
    "statistics": statistics,
}


def _rlds(job: Job) -> Any:
    from pizero.data import RldsDataset

    return RldsDataset(
        path=job["path"],
        split="train",
        cameras={"image": "observation/image_0"},
        horizon=HORIZON,
        **KEYS,
    )


def _lerobot(job: Job) -> Any:
    from pizero.data.lerobot import LeRobotDataset

    return LeRobotDataset(
        path=job["path"],
        cameras={name: f"observation.images.{name}" for name in job["cameras"]},
        state="observation.state",
        action="action",
        horizon=HORIZON,
    )


# What a process costs -----------------------------------------------------------------------------


def processor_seconds() -> float:
    """User and system time of this process, its children, and theirs, ended or not."""
    ticks = 0
    for pid, stat in _family().items():
        # utime, stime, and those of children that ended; the clock knows our own more exactly
        ticks += sum(int(x) for x in stat[13 if pid == os.getpid() else 11 : 15])
    return time.process_time() + ticks / TICK


def resident() -> tuple[float, float]:
    """MB of this process, and of it and its children with shared pages counted once."""
    own = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6
    shares = 0
    for pid in _family():
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                shares += int(line.split()[1])
    return own, shares * 1024 / 1e6


def _family() -> dict[int, list[str]]:
    """The fields of /proc/<pid>/stat after the name, of this process and all below it."""
    every = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:  # it has just ended
                continue
            every[int(entry.name)] = text.rpartition(")")[2].split()
    members, found = [os.getpid()], {}
    while members:
        pid = members.pop()
        found[pid] = every[pid]
        members += [child for child, stat in every.items() if int(stat[1]) == pid]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
