"""Batches for training and validation, the same for any number of ranks and workers.

A global batch is the sample numbers [n, n + global_batch_size); each rank reads its fixed slice of
it, in `accumulate` pieces. Batches are made inside the workers. How far a run has come is one
integer, `samples`, which counts what was handed out, not what workers prefetched.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pizero.data.augment import Augmentation
from pizero.data.dataset import RldsDataset
from pizero.data.mix import Mix
from pizero.data.pipeline import PolicyPipeline
from pizero.data.sampler import permute, rank_samples
from pizero.types import Batch, Observation

Pipelines = PolicyPipeline | Mapping[str, PolicyPipeline]


class TrainLoader:
    """An endless iterator of this rank's batches.

    `pipeline` may be one per dataset of a mix, by name, where robots differ in statistics.
    `start_sample` resumes: it is the `samples` of an earlier loader. `global_batch_size` is one
    optimizer step; it comes in `accumulate` batches of global_batch_size / world_size / accumulate.
    """

    def __init__(
        self,
        *,
        dataset: RldsDataset | Mix,
        pipeline: Pipelines,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
        accumulate: int = 1,
        augmentation: Augmentation | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        if start_sample % global_batch_size:
            raise ValueError(
                f"expected start_sample as a multiple of global_batch_size {global_batch_size}, "
                f"got {start_sample}"
            )
        self.samples = start_sample
        self.global_batch_size, self.accumulate = global_batch_size, accumulate
        self._slice = {
            "global_batch_size": global_batch_size,
            "rank": rank,
            "world_size": world_size,
            "accumulate": accumulate,
        }
        rank_samples(start_sample, **self._slice)  # refuses sizes that do not divide
        self._source = _TrainSource(_as_mix(dataset), pipeline, seed, augmentation)
        self._options = _loader_options(num_workers, prefetch, pin_memory, start_method)

    def __iter__(self) -> Iterator[Batch]:
        numbers = _MicroBatches(self.samples, self._slice)
        loader = DataLoader(self._source, batch_sampler=numbers, **self._options)
        for i, tensors in enumerate(loader, start=1):
            if i % self.accumulate == 0:
                self.samples += self.global_batch_size
            yield _to_batch(tensors)


class ValLoader:
    """A fixed subset of a held-out split: the same frames, in the same order, on every pass.

    `num_samples` frames are chosen once from the seed, rounded down to whole global batches so that
    every rank has equally many. Sample numbers count from 0, so noise and flow times repeat too.
    """

    def __init__(
        self,
        *,
        dataset: RldsDataset | Mix,
        pipeline: Pipelines,
        seed: int,
        num_samples: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        mix = _as_mix(dataset)
        self._len = min(num_samples, len(mix)) // global_batch_size
        if not self._len:
            raise ValueError(
                f"expected at least one validation batch of {global_batch_size}, got "
                f"num_samples={num_samples} of {len(mix)} held-out frames"
            )
        slices = {"global_batch_size": global_batch_size, "rank": rank, "world_size": world_size}
        self._numbers = [
            row.tolist()
            for step in range(self._len)
            for row in rank_samples(step * global_batch_size, **slices)
        ]
        self._source = _ValSource(mix, pipeline, seed)
        self._options = _loader_options(num_workers, prefetch, pin_memory, start_method)

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Batch]:
        for tensors in DataLoader(self._source, batch_sampler=self._numbers, **self._options):
            yield _to_batch(tensors)


class _Source(Dataset):
    """Sample numbers to a dictionary of tensors; lives in the workers."""

    def __init__(self, mix: Mix, pipeline: Pipelines) -> None:
        if isinstance(pipeline, PolicyPipeline):
            pipeline = dict.fromkeys(mix.names, pipeline)
        missing = [name for name in mix.names if name not in pipeline]
        if missing:
            raise ValueError(f"expected a pipeline for every dataset, got none for {missing}")
        self.mix = mix
        self.pipelines = [pipeline[name] for name in mix.names]

    def collate(self, samples: np.ndarray, where: tuple[np.ndarray, np.ndarray]) -> Batch:
        encoded = [
            self.pipelines[d].encode(self.mix.read(d, i))
            for d, i in zip(where[0].tolist(), where[1].tolist(), strict=True)
        ]
        return self.pipelines[0].collate(encoded, samples)


class _TrainSource(_Source):
    def __init__(
        self, mix: Mix, pipeline: Pipelines, seed: int, augmentation: Augmentation | None
    ) -> None:
        super().__init__(mix, pipeline)
        self.seed, self.augmentation = seed, augmentation
        self.order = mix.order(seed)

    def __getitems__(self, numbers: list[int]) -> dict[str, Tensor]:
        samples = np.array(numbers, np.int64)
        batch = self.collate(samples, self.mix.locate(self.order, samples))
        tensors = _to_tensors(batch)
        if self.augmentation is not None:
            images = tensors["images"]
            tensors["images"] = self.augmentation(images, seed=self.seed, samples=samples)
        return tensors


class _ValSource(_Source):
    def __init__(self, mix: Mix, pipeline: Pipelines, seed: int) -> None:
        super().__init__(mix, pipeline)
        self.seed = seed
        self.ends = np.cumsum([len(mix.datasets[name]) for name in mix.names])

    def __getitems__(self, numbers: list[int]) -> dict[str, Tensor]:
        samples = np.array(numbers, np.int64)
        frame = permute(samples, len(self.mix), self.seed)
        dataset = np.searchsorted(self.ends, frame, side="right")
        frame = frame - np.concatenate([[0], self.ends[:-1]])[dataset]
        return _to_tensors(self.collate(samples, (dataset, frame)))


class _MicroBatches:
    """The sample numbers of one rank's batches, without end."""

    def __init__(self, first: int, slices: dict[str, int]) -> None:
        self.first, self.slices = first, slices

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first
        while True:
            yield from rank_samples(first, **self.slices).tolist()
            first += self.slices["global_batch_size"]


def _as_mix(dataset: RldsDataset | Mix) -> Mix:
    return dataset if isinstance(dataset, Mix) else Mix(datasets={"dataset": dataset})


def _loader_options(
    num_workers: int, prefetch: int, pin_memory: bool, start_method: str | None
) -> dict[str, Any]:
    options: dict[str, Any] = {"collate_fn": _as_is, "num_workers": num_workers}
    options["pin_memory"] = pin_memory and torch.cuda.is_available()
    if num_workers:
        options |= {"prefetch_factor": prefetch, "multiprocessing_context": start_method}
        options["worker_init_fn"] = _outlive_stop_signals
    return options


def _outlive_stop_signals(worker: int) -> None:
    """Schedulers signal every process of a job; the trainer needs its workers to finish a step."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_is(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def _to_tensors(batch: Batch) -> dict[str, Tensor]:
    """A plain dictionary, which is what the loader can pin and send between processes."""
    observation = batch.observation
    tensors = {
        "images": observation.images,
        "image_mask": observation.image_mask,
        "tokens": observation.tokens,
        "token_mask": observation.token_mask,
        "state": observation.state,
        "token_causal": observation.token_causal,
        "token_loss": observation.token_loss,
        "actions": batch.actions,
        "action_mask": batch.action_mask,
        "sample": batch.sample,
    }
    return {name: x for name, x in tensors.items() if x is not None}


def _to_batch(tensors: dict[str, Tensor]) -> Batch:
    observation = Observation(
        images=tensors["images"],
        tokens=tensors["tokens"],
        image_mask=tensors.get("image_mask"),
        token_mask=tensors.get("token_mask"),
        state=tensors.get("state"),
        token_causal=tensors.get("token_causal"),
        token_loss=tensors.get("token_loss"),
    )
    return Batch(
        observation=observation,
        actions=tensors["actions"],
        action_mask=tensors["action_mask"],
        sample=tensors["sample"],
    )
