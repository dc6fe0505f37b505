"""Batches for training and validation, the same for any number of ranks and workers.

A global batch is the sample numbers [n, n + global_batch_size); each rank reads its fixed slice of
it, in `accumulate` pieces. Batches are made inside the workers. How far a run has come is one
integer, `samples`, which counts what was handed out, not what workers prefetched.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pizero.data.dataset import EpisodeDataset, Sample
from pizero.data.mix import Mix
from pizero.data.pipeline import PolicyPipeline
from pizero.data.sampler import permute, rank_samples
from pizero.types import Batch, Observation

Pipelines = PolicyPipeline | Mapping[str, PolicyPipeline]

MOST_SKIPPED = 1000  # unreadable frames in a row; a data set with more is lost
log = logging.getLogger(__name__)


class TrainLoader:
    """An endless iterator of this rank's batches.

    `pipeline` may be one per dataset of a mix, by name, where robots or statistics differ.
    `start_sample` resumes: it is the `samples` of an earlier loader. `global_batch_size` is one
    optimizer step; it comes in `accumulate` batches of global_batch_size / world_size / accumulate.
    `order` is global or windowed, with `window` episodes in a block (sampler.Order). `skipped`
    counts samples that could not be read and were replaced, on this rank.
    """

    def __init__(
        self,
        *,
        dataset: EpisodeDataset | Mix,
        pipeline: Pipelines,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
        accumulate: int = 1,
        order: str = "global",
        window: int = 64,
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
        self.samples, self.skipped, self.seed = start_sample, 0, seed
        self.global_batch_size, self.accumulate = global_batch_size, accumulate
        self._slice = {
            "global_batch_size": global_batch_size,
            "rank": rank,
            "world_size": world_size,
            "accumulate": accumulate,
        }
        rank_samples(start_sample, **self._slice)  # refuses sizes that do not divide
        self._source = _TrainSource(_as_mix(dataset), pipeline, seed, order, window)
        self._options = _loader_options(num_workers, prefetch, pin_memory, start_method)

    def __iter__(self) -> Iterator[Batch]:
        numbers = _MicroBatches(self.samples, self._slice)
        for i, tensors in enumerate(self._batches(numbers), start=1):
            if i % self.accumulate == 0:
                self.samples += self.global_batch_size
            self.skipped += int(tensors["skipped"])
            yield _to_batch(tensors)

    def _batches(self, numbers: Iterable[list[int]]) -> Iterable[dict[str, Tensor]]:
        """The tensors of each batch of sample numbers."""
        return DataLoader(self._source, batch_sampler=numbers, **self._options)


class ValLoader:
    """A fixed subset of a held-out split: the same frames, in the same order, on every pass.

    `num_samples` frames are chosen once from the seed, rounded down to whole global batches so that
    every rank has equally many. Sample numbers count from 0, so noise and flow times repeat too.
    """

    def __init__(
        self,
        *,
        dataset: EpisodeDataset | Mix,
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
        shapes = {name: _shapes(pipeline[name]) for name in mix.names}
        for name, shape in shapes.items():
            if shape != shapes[mix.names[0]]:
                raise ValueError(
                    f"pipelines of a mix must give equal shapes, got {mix.names[0]}: "
                    f"{shapes[mix.names[0]]} and {name}: {shape}"
                )
        self.said = 0

    def collate(
        self, samples: np.ndarray, where: tuple[np.ndarray, np.ndarray], *, draw: bool
    ) -> dict[str, Tensor]:
        found, skipped = [], 0
        for d, i, number in zip(*(x.tolist() for x in (*where, samples)), strict=True):
            sample, failed = self.read(d, i, number if draw else None)
            found.append(sample)
            skipped += failed
        return self.encode(found, samples) | {"skipped": torch.tensor(skipped)}

    def encode(self, found: Sequence[Sample], numbers: np.ndarray) -> dict[str, Tensor]:
        """What the pipelines make of samples with these numbers."""
        pipelines = dict(zip(self.mix.names, self.pipelines, strict=True))
        encoded = [pipelines[sample["dataset"]].encode(sample) for sample in found]
        return _to_tensors(self.pipelines[0].collate(encoded, numbers))

    def read(self, dataset: int, frame: int, draw: int | None) -> tuple[Sample, int]:
        """The sample, or where it is damaged and may be skipped the next one; how many were."""
        part = self.mix.datasets[self.mix.names[dataset]]
        for failed in range(MOST_SKIPPED):
            place = (frame + failed) % len(part)
            try:
                return self.mix.read(dataset, place, draw=draw), failed
            except (OSError, ValueError) as error:
                if part.on_error == "raise":
                    raise
                self.said += 1
                if self.said <= 20:
                    log.warning("skipped frame %d of %s: %s", place, part.index.directory, error)
        raise ValueError(
            f"{part.index.directory}: {MOST_SKIPPED} frames from frame {frame} on cannot be read"
        )


class _TrainSource(_Source):
    def __init__(self, mix: Mix, pipeline: Pipelines, seed: int, order: str, window: int) -> None:
        super().__init__(mix, pipeline)
        self.order = mix.order(seed, kind=order, window=window)
        self.advised: dict[tuple[int, int, int], None] = {}  # the latest, in order

    def __getitems__(self, numbers: list[int]) -> dict[str, Tensor]:
        samples = np.array(numbers, np.int64)
        for block in self.order.blocks(samples):
            self.advise(block)
            self.advise(self.order.following(*block))
        return self.collate(samples, self.mix.locate(self.order, samples), draw=True)

    def advise(self, block: tuple[int, int, int]) -> None:
        if block not in self.advised:
            self.mix.advise(self.order, block)
            self.advised[block] = None
            if len(self.advised) > 4 * len(self.order.sizes):
                del self.advised[next(iter(self.advised))]


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
        return self.collate(samples, (dataset, frame), draw=False)


class _MicroBatches:
    """The sample numbers of one rank's batches, without end."""

    def __init__(self, first: int, slices: dict[str, int]) -> None:
        self.first, self.slices = first, slices

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first
        while True:
            yield from rank_samples(first, **self.slices).tolist()
            first += self.slices["global_batch_size"]


def _shapes(pipeline: PolicyPipeline) -> dict[str, Any]:
    """What decides the shapes of a batch."""
    return {
        "images": len(pipeline.cameras) * pipeline.frames,
        "image_size": pipeline.image_size,
        "horizon": pipeline.horizon,
        "action_dim": pipeline.action_dim,
        "state_dim": pipeline.state_dim,
        "max_tokens": pipeline.max_tokens,
        "trim_tokens": pipeline.trim_tokens,
        "speaks": pipeline.fast is not None,
    }


def _as_mix(dataset: EpisodeDataset | Mix) -> Mix:
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
