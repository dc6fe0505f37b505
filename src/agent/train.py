"""Training: the workspace that config/train_*.yaml names.

    TrainWorkspace.run -> Trainer.train -> Trainer.step

Everything random about a step follows from (seed, numbers of its samples), and everything else is
in the checkpoint: a run that was killed and started again ends in the same weights, bit for bit, as
one that was not. The loss is a mean over the entries of the global batch that count, however the
batch is split into ranks and passes; what an entry is depends on the policy (training/losses.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.nn.parallel import DistributedDataParallel

from pizero.agent import checkpoint
from pizero.agent.config import Precision, Resume, TrainConfig, build, to_yaml
from pizero.agent.report import write_report
from pizero.agent.training import prepare, resume
from pizero.agent.training.distributed import Ranks, StopSignals, join
from pizero.agent.training.ema import WeightAverage
from pizero.agent.training.losses import loss_of
from pizero.agent.training.optim import freeze, make_optimizer, set_rate
from pizero.agent.training.progress import Journal, duration
from pizero.agent.training.validate import validate
from pizero.agent.weights import inspect, load_into
from pizero.agent.weights.folder import read_description
from pizero.data.hashing import mix_bits
from pizero.data.loader import TrainLoader, ValLoader
from pizero.data.rlds.tfdata import TfLoader, TfMix
from pizero.model import PiZero, PiZeroFast
from pizero.types import Batch, Tensor

log = logging.getLogger(__name__)


class TrainWorkspace:
    """Trains a policy in `config.run_dir`, from the newest checkpoint there if there is one."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def run(self) -> None:
        """Train to the last step, or until SIGTERM or SIGUSR1 asks to save and leave."""
        config = self.config
        with join(device=config.device, threads=config.threads) as ranks, StopSignals() as signals:
            Trainer(config, ranks=ranks, signals=signals).train()


class Trainer:
    """One sitting of a run: the model, its optimizer and data, put back to where the run stood."""

    def __init__(self, config: TrainConfig, *, ranks: Ranks, signals: StopSignals) -> None:
        self.config, self.ranks, self.signals = config, ranks, signals
        self.folder = Path(config.run_dir)
        self.root = self.folder / "checkpoints"
        previous = self._previous()
        self.first_step = 0 if previous is None else checkpoint.step_of(previous)

        data = build(config.data.train, path="data.train")
        held_out = build(config.data.val, path="data.val")
        prepare.learn_from_data(config, data, held_out, ranks, previous=previous)
        names = prepare.by_pipeline(config, data)
        pipelines = {
            name: checkpoint.build_pipeline(config, self.folder, dataset=name) for name in names
        }
        # What all have in common (sizes, words) is asked of any.
        self.pipeline = next(iter(pipelines.values()))
        pipeline = self.pipeline
        if None not in pipelines:
            pipeline = {name: p for name, p in pipelines.items() if name is not None}
        self.units = self.pipeline if len(pipelines) == 1 else None  # robots may differ in them
        self.augmentation = None
        if config.data.augment is not None:
            self.augmentation = build(
                config.data.augment, path="data.augment", cameras=self.pipeline.cameras
            )
        self.data = {"train": prepare.describe(data), "val": prepare.describe(held_out)}
        self.model = self._make_model()
        self.loss = loss_of(self.model, self.pipeline, config)
        self.average = None
        if config.ema_decay is not None:
            self.average = WeightAverage(self.model, decay=config.ema_decay)
        self.optimizer = make_optimizer(config.optim, self.model.parameter_groups())
        self.schedule = build(config.schedule, path="schedule")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if previous is not None:
            self._return_to(previous)
        self.passes = num_passes(
            config.batch_size, world_size=ranks.world_size, micro_batch_size=config.micro_batch_size
        )
        self.parallel = self.model
        if ranks.world_size > 1:
            # A static graph does not allow passes whose gradients are exchanged later.
            self.parallel = DistributedDataParallel(
                self.model, static_graph=self.passes == 1, gradient_as_bucket_view=True
            )
        loader = TfLoader if isinstance(data, TfMix) else TrainLoader
        self.loader = loader(
            dataset=data,
            pipeline=pipeline,
            seed=config.seed,
            global_batch_size=config.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            start_sample=self.first_step * config.batch_size,
            accumulate=self.passes,
            order=config.data.order,
            window=config.data.window,
            num_workers=config.data.workers,
            pin_memory=ranks.device.type == "cuda",
        )
        self.skipped = 0  # damaged samples, on all ranks
        self.val_loader = ValLoader(
            dataset=held_out,
            pipeline=pipeline,
            seed=config.seed,
            num_samples=config.validate.frames,
            global_batch_size=config.validate.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )

    def train(self) -> None:
        """The loop: step, and every so often look, validate, save."""
        config = self.config
        if self.first_step >= config.steps:
            self._say(f"{self.folder} has all its {self.first_step} steps; nothing to do")
            return
        with self._journal() as journal:
            self._introduce(journal)
            started, reason = time.monotonic(), None
            pending: list[tuple[int, Tensor, Tensor, dict[str, float]]] = []
            batches = iter(self.loader)
            for step in range(self.first_step + 1, config.steps + 1):
                pending.append((step, *self.step(step, list(islice(batches, self.passes)))))
                is_last = step == config.steps
                is_due = {
                    "look": is_last or step % config.log_every == 0,
                    "validate": is_last or step % config.validate.every == 0,
                    "save": is_last or step % config.checkpoint.every == 0,
                }
                if not any(is_due.values()):
                    continue
                reason = self._look(journal, pending, started)
                pending.clear()
                if is_due["validate"]:
                    self._validate(journal, step)
                if is_due["save"] or reason:
                    self._save(journal, step)
                if reason:
                    journal.say(f"stopped at step {step} by {reason}; the same command goes on")
                    return
            journal.say(f"done: {config.steps} steps, {duration(time.monotonic() - started)}")
        if self.ranks.is_main:
            write_report(self.folder / "report.html", training=self.folder, title=config.name)

    def step(self, step: int, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """One optimizer step: this rank's part of the loss, the gradient's norm, the rates."""
        config, ranks = self.config, self.ranks
        # Layers that draw at random (dropout of an adapter) draw the same after a restart.
        torch.manual_seed(int(mix_bits(config.seed, step, ranks.rank)) >> 1)
        entries = torch.stack([self.loss.entries(b) for b in batches]).sum().double()
        entries = ranks.sum(entries.to(ranks.device))
        part = torch.zeros((), device=ranks.device)
        for i, batch in enumerate(batches):
            inputs = self._augmented(self.loss.inputs(batch, ranks.device), batch)
            counted = self.loss.counted(batch).to(ranks.device, non_blocking=True)
            with self._gradients_meet(i == len(batches) - 1):
                with self.autocast():
                    losses = self.parallel(*inputs)
                losses = losses.masked_fill(~counted, 0.0)
                loss = losses.sum(dtype=torch.float32) / entries.float()
                # DistributedDataParallel takes the mean over ranks; this loss wants their sum.
                (loss * ranks.world_size).backward()
            part += loss.detach()
        limit = float("inf") if config.optim.clip_norm is None else config.optim.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.trained, limit)
        rates = set_rate(self.optimizer, self.schedule(step=step - 1, total=config.steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step - 1)
        return part, norm, rates

    def _augmented(self, inputs: tuple[Any, ...], batch: Batch) -> tuple[Any, ...]:
        """The model's inputs with augmented pictures, made on the device."""
        if self.augmentation is None:
            return inputs
        observation, *others = inputs
        images = self.augmentation(
            observation.images, seed=self.config.seed, samples=batch.sample.numpy()
        )
        return (replace(observation, images=images), *others)

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of forward passes."""
        on_gpu = self.ranks.device.type == "cuda"
        wanted = self.config.precision
        if wanted is Precision.bf16 or (wanted is Precision.auto and on_gpu):
            return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @contextmanager
    def _gradients_meet(self, now: bool) -> Iterator[None]:
        """Exchange gradients between ranks in this pass or, until the last one, not yet."""
        if now or not isinstance(self.parallel, DistributedDataParallel):
            yield
        else:
            with self.parallel.no_sync():
                yield

    def _previous(self) -> Path | None:
        """The checkpoint to go on from; rank 0 looks and tidies, all agree."""
        found: tuple[Path | None, str | None] = (None, None)
        if self.ranks.is_main:
            try:
                previous = resume.checkpoint_to_continue(self.config, self.root)
                self.root.mkdir(parents=True, exist_ok=True)
                checkpoint.clean(self.root)
                _write(self.folder / "config.yaml", to_yaml(self.config))
                found = (previous, None)
            except ValueError as error:
                found = (None, str(error))
        previous, mistake = self.ranks.from_main(found)
        if mistake is not None:
            raise ValueError(mistake)
        return previous

    def _make_model(self) -> PiZero | PiZeroFast:
        config = self.config
        torch.manual_seed(config.seed)
        model = build(config.model, path="model")
        if self.pipeline.vocab_size > config.model["vocab_size"]:
            raise ValueError(
                f"the tokenizer has {self.pipeline.vocab_size} pieces, but "
                f"model.vocab_size is {config.model['vocab_size']}; make it at least as large"
            )
        if config.init_from is not None:
            found = inspect(config.init_from)
            # PaliGemma brings eyes and words; the action expert beside it starts from scratch.
            report = load_into(model, found, may_initialise=found.kind == "paligemma")
            if self.ranks.is_main:
                log.info("%s", report)
        freeze(model, config.freeze)
        model = model.to(self.ranks.device).train()
        if config.compile:
            model.compile_blocks()
        return model

    def _return_to(self, previous: Path) -> None:
        if self.config.resume is not Resume.changed:
            _, metadata = read_description(previous)
            resume.refuse_other_data(metadata["data"], self.data)
        checkpoint.load_training_state(
            previous, model=self.model, average=self.average, optimizer=self.optimizer
        )

    def _look(self, journal: Journal, pending: list[Any], started: float) -> str | None:
        """Write down the steps since the last look; a reason to stop, agreed by all ranks.

        The only place where the host waits for the device and the ranks for each other.
        """
        minutes = (time.monotonic() - started) / 60
        limit = self.config.max_minutes
        wants = [self.signals.received is not None, limit is not None and minutes >= limit]
        parts = torch.stack([part for _, part, _, _ in pending]).double()
        flags = [*map(float, wants), float(self.loader.skipped)]
        flags = torch.tensor(flags, dtype=torch.float64, device=self.ranks.device)
        summed = self.ranks.sum(torch.cat([parts, flags])).tolist()
        norms = torch.stack([norm for _, _, norm, _ in pending]).tolist()
        rows = [
            {"step": step, "kind": "train", "loss": loss, "grad_norm": norm} | _rate_columns(rates)
            for (step, _, _, rates), loss, norm in zip(pending, summed, norms, strict=False)
        ]
        journal.train(rows)
        if summed[-1] > self.skipped:
            self.skipped = int(summed[-1])
            journal.say(f"{self.skipped} damaged samples were replaced by their neighbours so far")
        for row in rows:
            if not float("-inf") < row["loss"] < float("inf"):
                raise ValueError(
                    f"the loss is {row['loss']} at step {row['step']}. The last checkpoint is from "
                    "before; a lower optim.lr, a longer schedule.warmup or precision=fp32 may help"
                )
        if summed[-3]:
            return self.signals.received or "a signal to another rank"
        return f"max_minutes={limit}" if summed[-2] else None

    def _validate(self, journal: Journal, step: int) -> None:
        with nullcontext() if self.average is None else self.average.applied():
            metrics, examples = validate(
                self.model,
                self.loss,
                self.units,
                self.val_loader,
                ranks=self.ranks,
                thresholds=self.config.validate.thresholds,
                autocast=self.autocast,
            )
        journal.val({"step": step, "kind": "val"} | metrics, examples)

    def _save(self, journal: Journal, step: int) -> None:
        if self.ranks.is_main:
            journal.sync()
            checkpoint.save_checkpoint(
                self.root,
                step=step,
                samples=self.loader.samples,
                config=to_yaml(self.config),
                model=self.model,
                average=self.average,
                optimizer=self.optimizer,
                files=self.folder,
                data=self.data,
            )
            keep = self.config.checkpoint
            checkpoint.prune(self.root, keep_last=keep.keep_last, keep_every=keep.keep_every)
        self.ranks.barrier()

    def _journal(self) -> Journal:
        config = self.config
        tracker = None
        if self.ranks.is_main and config.tracker is not None:
            tracker = build(config.tracker, path="tracker")
            nodes = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
            assert isinstance(nodes, dict)
            tracker.start(folder=self.folder, name=config.name, config=nodes)
        return Journal(
            self.folder,
            is_main=self.ranks.is_main,
            first_step=self.first_step,
            total=config.steps,
            batch_size=config.batch_size,
            tracker=tracker,
        )

    def _introduce(self, journal: Journal) -> None:
        groups = {}
        for group in self.optimizer.param_groups:
            size = sum(p.numel() for p in group["params"])
            groups[group["expert"]] = groups.get(group["expert"], 0) + size
        trained = ", ".join(f"{name} {size / 1e6:.3g} M" for name, size in groups.items())
        total = sum(p.numel() for p in self.model.parameters())
        where = f"{self.ranks.world_size} x {self.ranks.device.type}"
        frames = sum(part["frames"] for part in self.data["train"].values())
        journal.say(
            f"{self.config.name} in {self.folder}: {total / 1e6:.3g} M parameters, trained: "
            f"{trained}; {frames} frames; {where}, {self.passes} passes a step"
        )
        if self.first_step:
            journal.say(f"going on from step {self.first_step}")

    def _say(self, text: str) -> None:
        if self.ranks.is_main:
            print(text)


def num_passes(batch_size: int, *, world_size: int, micro_batch_size: int | None) -> int:
    """How many passes each rank makes for one global batch."""
    share, rest = divmod(batch_size, world_size)
    size = share if micro_batch_size is None else micro_batch_size
    if rest or size < 1 or share % size:
        raise ValueError(
            f"batch_size {batch_size} does not divide into {world_size} ranks"
            + ("" if micro_batch_size is None else f" times micro batches of {micro_batch_size}")
        )
    return share // size


def _rate_columns(rates: dict[str, float]) -> dict[str, float]:
    """One `lr` if all experts share it, else one for each."""
    if len(set(rates.values())) == 1:
        return {"lr": next(iter(rates.values()))}
    return {f"lr/{expert}": rate for expert, rate in rates.items()}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    temporary.replace(path)
