"""The processes of one run: who am I, on which device, and the few collectives training needs.

Everything is read from the environment that torchrun sets. A single process takes the same path
with world size 1 and no process group.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from pizero.types import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on each of them."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on each rank. Any small object that rank 0 made itself."""
        if self.world_size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0, device=self.device)
            value = box[0]
        return value


@contextmanager
def join(*, device: str, threads: int | None) -> Iterator[Ranks]:
    """Join the run described by RANK, WORLD_SIZE and LOCAL_RANK, and leave it at the end.

    `device` is auto, cpu or cuda. CPU ranks get one thread each unless told otherwise: several
    processes with a thread per core each only get in each other's way.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank)
    if threads is not None:
        torch.set_num_threads(threads)
    elif world_size > 1 and chosen.type == "cpu":
        torch.set_num_threads(1)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        # Rank 0 indexes data and computes statistics while the others wait.
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            timeout=timedelta(hours=2),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    try:
        yield Ranks(rank=rank, world_size=world_size, device=chosen)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda` as the device of one local rank."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    count = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise ValueError(f"local rank {local_rank} needs its own GPU, but torch sees {count}")
    return torch.device("cuda", local_rank)


class StopSignals:
    """Notes SIGTERM and SIGUSR1, which mean: save and leave.

    Repeats change nothing: SLURM signals every process, and torchrun passes its own copy on.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
