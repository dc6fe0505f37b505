"""Latency of one policy call: `python -m bench.infer --workload B --rounds 5`.

All contenders live in one process with the same weights, are checked against each other, and take
turns in random order, so what disturbs the machine disturbs all of them. The timed region goes from
uint8 pictures, words and state on the host to actions on the host.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import chain, cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import report
from bench.contenders import CONTENDERS, Contender, Setting, Unavailable, contender
from bench.roofline import floor, measure_ceilings
from bench.workloads import NUM_STEPS, SIZES, WORKLOADS, build_model, make_noise, make_observation
from pizero.types import Observation, Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Largest difference of actions, as a part of their largest value, for outputs to count as equal.
TOLERANCE = {"bf16": 5e-2, "fp32": 1e-4}


@dataclass
class Timings:
    """Milliseconds of every call, by round."""

    host_to_host: list[list[float]] = field(default_factory=list)
    on_device: list[list[float]] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    result = run(options)
    print_result(result)
    path = options.out or report.result_path(f"infer-{options.workload}", result["device"])
    report.write_json(path, result)
    print(f"wrote {path}")
    return 0 if all("disagrees" not in c for c in result["contenders"].values()) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.infer", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="B")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="bf16 on a GPU, else fp32")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--compile-mode", default="max-autotune-no-cudagraphs", help="`mode` of torch.compile"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=50, help="timed calls per round, each way")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="Euler steps")
    parser.add_argument("--inputs", type=int, default=4, help="input sets that take turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; --size small --device cpu runs anywhere")
    if options.dtype is None:
        options.dtype = "bf16" if options.device.startswith("cuda") else "fp32"
    return options


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark, as what will be written to JSON."""
    workload, device = WORKLOADS[options.workload], torch.device(options.device)
    torch.manual_seed(options.seed)
    with torch.device(device):
        model = build_model(workload, size=options.size).eval()
    if options.dtype == "bf16":
        model.cast(torch.bfloat16)
    inputs = [
        _pin(make_observation(workload, model, batch=1, seed=i), make_noise(model, batch=1, seed=i))
        for i in range(options.inputs)
    ]
    setting = Setting(
        workload=workload,
        model=model,
        example=_upload(inputs[0], device),
        num_steps=options.steps,
        dtype=DTYPES[options.dtype],
        compile_mode=options.compile_mode,
    )
    entries: dict[str, dict[str, Any]] = {}
    ready: list[Contender] = []
    for name in options.contenders:
        started = time.perf_counter()
        try:
            made = contender(name, setting)
        except Unavailable as reason:
            entries[name] = {"skipped": str(reason)}
            continue
        _synchronise(device)
        entries[name] = {"ready_after_s": time.perf_counter() - started}
        ready.append(made)
    ready = _agreeing(ready, inputs, device, TOLERANCE[options.dtype], entries)
    ceilings = measure_ceilings(device)
    bound = floor(
        workload,
        model,
        ceilings,
        bytes_per_weight=2 if options.dtype == "bf16" else 4,
        num_steps=options.steps,
    )
    clocks = report.clocks(device)
    timings = _race(ready, inputs, device, options, entries)
    _summarise(entries, timings, bound.total, bound.with_gaps)
    return {
        "benchmark": "infer",
        "workload": asdict(workload),
        "size": options.size,
        "dtype": options.dtype,
        "steps": options.steps,
        "rounds": options.rounds,
        "calls_per_round": options.calls,
        "device": report.device_name(device),
        "smoke": device.type == "cpu",
        "ceilings": asdict(ceilings),
        "floor_ms": asdict(bound),
        "clocks_before": clocks,
        "clocks_after": report.clocks(device),
        "versions": report.versions(),
        "contenders": entries,
    }


def print_result(result: dict[str, Any]) -> None:
    floors = result["floor_ms"]
    rows, absent = [], []
    for name, entry in result["contenders"].items():
        if reason := entry.get("skipped") or entry.get("disagrees"):
            absent.append(f"{name} does not take part: {reason}")
            continue
        host, inner = entry["host_to_host_ms"], entry["on_device_ms"]
        rows.append(
            (
                name,
                f"{host['median']:.2f}",
                f"{host['iqr']:.2f}",
                f"{entry['times_first']['median']:.2f}x",
                f"{inner['median']:.2f}",
                *(f"{host[p]:.2f}" for p in ("p50", "p95", "p99")),
                f"{entry['percent_of_roofline']:.0f}",
                f"{entry['percent_of_gap_adjusted_floor']:.0f}",
                f"{entry['peak_gb']:.2f}" if "peak_gb" in entry else "-",
            )
        )
    title = (
        f"inference, workload {result['workload']['name']}, {result['size']}, {result['dtype']}, "
        f"{result['device']}\nms; floor {floors['total']:.2f}, with gaps between kernels "
        f"{floors['with_gaps']:.2f}" + "\nsmoke run: a CPU tells nothing of speed" * result["smoke"]
    )
    columns = ("contender", "host to host", "IQR", "of first", "on device", "p50", "p95", "p99")
    report.show(title, (*columns, "% floor", "% gap floor", "peak GB"), rows)
    print("\n".join(absent))


def _agreeing(
    ready: list[Contender],
    inputs: list[tuple[Observation, Tensor]],
    device: torch.device,
    tolerance: float,
    entries: dict[str, dict[str, Any]],
) -> list[Contender]:
    """Those whose actions equal the first contender's, on every input; notes the difference."""
    agreeing = []
    for c in ready:
        worst = 0.0
        for x in inputs:
            # A graph overwrites its output at every replay.
            reference = ready[0].sample(*_upload(x, device)).clone()
            actions = c.sample(*_upload(x, device))
            worst = max(worst, float((actions - reference).abs().max() / reference.abs().max()))
        entries[c.name]["difference"] = worst
        if worst <= tolerance:
            agreeing.append(c)
        else:
            entries[c.name]["disagrees"] = f"actions differ from {ready[0].name}'s by {worst:.1e}"
    return agreeing


def _race(
    ready: list[Contender],
    inputs: list[tuple[Observation, Tensor]],
    device: torch.device,
    options: argparse.Namespace,
    entries: dict[str, dict[str, Any]],
) -> dict[str, Timings]:
    timings = {c.name: Timings() for c in ready}
    turns = cycle(inputs)
    uploaded = cycle([_upload(x, device) for x in inputs])
    for c in ready:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(options.warmup):
            c.sample(*next(uploaded))
        _synchronise(device)
        if device.type == "cuda":
            # Every contender's weights are resident: this is the peak with all of them around.
            entries[c.name]["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            entries[c.name]["kernels"] = _kernels(lambda c=c: c.sample(*next(uploaded)))
    order = random.Random(options.seed)
    for _ in range(options.rounds):
        for c in order.sample(ready, len(ready)):
            host = [_host_to_host(c, next(turns), device) for _ in range(options.calls)]
            inner = [
                _on_device(lambda c=c: c.sample(*next(uploaded)), device)
                for _ in range(options.calls)
            ]
            timings[c.name].host_to_host.append(host)
            timings[c.name].on_device.append(inner)
    return timings


def _summarise(
    entries: dict[str, dict[str, Any]], timings: dict[str, Timings], bound: float, with_gaps: float
) -> None:
    """Medians of rounds, and ratios between contenders within each round."""
    first = next(iter(timings.values()))
    for name, t in timings.items():
        rounds = [median(r) for r in t.host_to_host]
        ratios = [r / median(f) for r, f in zip(rounds, first.host_to_host, strict=True)]
        host = report.spread(rounds) | report.percentiles(list(chain(*t.host_to_host)))
        inner = report.spread([median(r) for r in t.on_device])
        entries[name] |= {
            "host_to_host_ms": host,
            "on_device_ms": inner | report.percentiles(list(chain(*t.on_device))),
            "times_first": report.spread(ratios),
            "percent_of_roofline": 100 * bound / inner["median"],
            "percent_of_gap_adjusted_floor": 100 * with_gaps / inner["median"],
        }


def _host_to_host(c: Contender, inputs: tuple[Observation, Tensor], device: torch.device) -> float:
    started = time.perf_counter()
    c.sample(*_upload(inputs, device)).cpu()
    return 1e3 * (time.perf_counter() - started)


def _on_device(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _kernels(call: Callable[[], Tensor]) -> int:
    """Kernels, copies and fills that one call runs on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(e.device_type.name == "CUDA" for e in profile.events() or ())


def _upload(inputs: tuple[Observation, Tensor], device: torch.device) -> tuple[Observation, Tensor]:
    observation, noise = inputs
    return observation.to(device), noise.to(device, non_blocking=True)


def _pin(observation: Observation, noise: Tensor) -> tuple[Observation, Tensor]:
    """The inputs in host memory from which a GPU can copy without a stop."""
    if not torch.cuda.is_available():
        return observation, noise
    state = observation.state
    return (
        Observation(
            images=observation.images.pin_memory(),
            tokens=observation.tokens.pin_memory(),
            state=None if state is None else state.pin_memory(),
        ),
        noise.pin_memory(),
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    raise SystemExit(main())
