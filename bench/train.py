"""Training throughput: `python -m bench.train --workload B --batch 32 --rounds 5`.

One model, fp32 master weights, bf16 autocast on a GPU, fused AdamW, synthetic batches. The arms
(eager or compiled layers, one or four flow samples of an observation) share it and take turns in
random order. Their losses for the same inputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import report
from bench.roofline import measure_ceilings, peak_tflops
from bench.workloads import (
    SIZES,
    WORKLOADS,
    Workload,
    build_model,
    make_batch,
    make_noise,
    products,
    stage_flops,
)
from pizero.model import PiZero
from pizero.types import Batch

PHASES = ("forward", "backward", "optimizer")
TOLERANCE = 2e-2  # of the loss between arms with one number of flow samples


@dataclass(frozen=True)
class Arm:
    """One way to train: compiled layers or not, and flow samples per observation."""

    is_compiled: bool
    samples: int

    @property
    def name(self) -> str:
        return f"{'compiled' if self.is_compiled else 'eager'}, {self.samples} flow samples"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    result = run(options)
    print_result(result)
    path = options.out or report.result_path(f"train-{options.workload}", result["device"])
    report.write_json(path, result)
    print(f"wrote {path}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="B")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="flow samples")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled arms")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=10, help="timed steps of an arm per round")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; --size small --device cpu runs anywhere")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark, as what will be written to JSON."""
    workload, device = WORKLOADS[options.workload], torch.device(options.device)
    torch.manual_seed(options.seed)
    with torch.device(device):
        model = build_model(workload, size=options.size)
        batches = [make_batch(workload, model, batch=options.batch, seed=seed) for seed in range(4)]
    ways = (False,) if options.no_compile else (False, True)
    arms = [Arm(is_compiled, k) for k in options.samples for is_compiled in ways]
    if not options.no_compile:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True
    )
    ceilings = measure_ceilings(device)
    losses = _check_losses(model, batches[0], arms)
    entries: dict[str, dict[str, Any]] = {}
    for arm in arms:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for i in range(options.warmup):
            _step(model, optimizer, batches[i % 4], arm)
        entries[arm.name] = {"loss": losses[arm.name]}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            entries[arm.name]["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            entries[arm.name]["reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    clocks = report.clocks(device)
    rounds: dict[str, list[list[float]]] = {arm.name: [] for arm in arms}
    order = random.Random(options.seed)
    for _ in range(options.rounds):
        for arm in order.sample(arms, len(arms)):
            steps = [_step(model, optimizer, batches[i % 4], arm) for i in range(options.calls)]
            rounds[arm.name].append([median(phase) for phase in zip(*steps, strict=True)])
    card = report.device_name(device)
    for arm in arms:
        totals = [sum(r) for r in rounds[arm.name]]
        firsts = [sum(r) for r in rounds[arms[0].name]]
        seconds = median(totals) / 1e3
        teraflops = train_flops(workload, model, arm.samples) * options.batch / seconds / 1e12
        peak = peak_tflops(card)
        entries[arm.name] |= {
            "step_ms": report.spread(totals),
            "phases_ms": {
                name: median(r[i] for r in rounds[arm.name]) for i, name in enumerate(PHASES)
            },
            "times_first": report.spread([t / f for t, f in zip(totals, firsts, strict=True)]),
            "samples_per_s": options.batch / seconds,
            "tflops": teraflops,
            "mfu_percent": None if peak is None else 100 * teraflops / peak,
            "util_percent": 100 * teraflops / ceilings.matmul_tflops,
        }
    return {
        "benchmark": "train",
        "workload": asdict(workload),
        "size": options.size,
        "batch": options.batch,
        "rounds": options.rounds,
        "steps_per_round": options.calls,
        "device": card,
        "smoke": device.type == "cpu",
        "ceilings": asdict(ceilings),
        "clocks_before": clocks,
        "clocks_after": report.clocks(device),
        "versions": report.versions(),
        "arms": entries,
    }


def train_flops(workload: Workload, model: PiZero, samples: int) -> int:
    """Model FLOPs of one observation: forward, and twice that backward; no recomputation."""
    found = products(workload, model, num_steps=1)
    once = sum(stage_flops(found, stage) for stage in ("vision", "prefix", "state"))
    return 3 * (once + samples * sum(stage_flops(found, s) for s in ("tables", "step")))


def print_result(result: dict[str, Any]) -> None:
    rows = []
    for name, entry in result["arms"].items():
        mfu = entry["mfu_percent"]
        rows.append(
            (
                name,
                f"{entry['step_ms']['median']:.1f}",
                f"{entry['step_ms']['iqr']:.1f}",
                f"{entry['times_first']['median']:.2f}x",
                *(f"{entry['phases_ms'][phase]:.1f}" for phase in PHASES),
                f"{entry['samples_per_s']:.1f}",
                "-" if mfu is None else f"{mfu:.1f}",
                f"{entry['util_percent']:.1f}",
                f"{entry['peak_gb']:.1f}" if "peak_gb" in entry else "-",
            )
        )
    title = (
        f"training, workload {result['workload']['name']}, {result['size']}, batch "
        f"{result['batch']}, {result['device']}\nms"
        + "\nsmoke run: a CPU tells nothing of speed"
        * result["smoke"]
    )
    columns = ("arm", "step", "IQR", "of first", *PHASES, "samples/s", "MFU %", "util %", "peak GB")
    report.show(title, columns, rows)


def _step(model: PiZero, optimizer: torch.optim.Optimizer, batch: Batch, arm: Arm) -> list[float]:
    """One training step; milliseconds of each phase."""
    stamps = [_stamp(batch.actions.device)]
    loss = _loss(model, batch, arm)
    stamps.append(_stamp(batch.actions.device))
    with _stance(arm):
        loss.backward()
    stamps.append(_stamp(batch.actions.device))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    stamps.append(_stamp(batch.actions.device))
    if not isinstance(stamps[0], float):
        stamps[-1].synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(stamps)]
    return [1e3 * (b - a) for a, b in pairwise(stamps)]


def _loss(model: PiZero, batch: Batch, arm: Arm) -> torch.Tensor:
    device = batch.actions.device
    rows = len(batch.actions)
    with torch.device(device):
        noise = make_noise(model, batch=rows, seed=7, samples=arm.samples)
        flow_time = torch.linspace(0.05, 0.95, rows * arm.samples).view(rows, arm.samples)
    with _stance(arm), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        errors = model(batch.observation, batch.actions, noise, flow_time)
    return errors.mean()


def _check_losses(model: PiZero, batch: Batch, arms: list[Arm]) -> dict[str, float]:
    """The loss of every arm for one batch; arms that draw equally often must agree."""
    # With gradients, as in training: without them, every layer would be compiled once more.
    losses = {arm: _loss(model, batch, arm).item() for arm in arms}
    for arm, loss in losses.items():
        twin = losses.get(Arm(not arm.is_compiled, arm.samples), loss)
        if abs(loss - twin) > TOLERANCE * abs(twin):
            raise RuntimeError(f"{arm.name}: loss {loss:.6f}, but {twin:.6f} the other way")
    return {arm.name: loss for arm, loss in losses.items()}


@contextmanager
def _stance(arm: Arm) -> Iterator[None]:
    """Run compiled layers as compiled or, with the same model, eagerly."""
    with torch.compiler.set_stance("default" if arm.is_compiled else "force_eager"):
        yield


def _stamp(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


if __name__ == "__main__":
    raise SystemExit(main())
