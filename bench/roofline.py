"""How fast a machine could be: two ceilings measured in the same run, and the floors they give.

The roofline floor sums, over all matrix products of a call, the longer of computing and reading.
The gap-adjusted floor adds what a dependent kernel costs even inside a CUDA graph, for the fewest
kernels a well-fused pi0 needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.workloads import NUM_STEPS, Product, Workload, products, siglip
from pizero.model import PiZero

# Datasheet peak of dense bf16 matrix products, TFLOP/s: the denominator of "MFU".
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
}
KERNEL_GAP_S = 1.3e-6  # between dependent kernels of a CUDA graph on an H100


@dataclass(frozen=True)
class Ceilings:
    """Rates of this device: TFLOP/s of a large matrix product, TB/s of a large copy."""

    matmul_tflops: float
    copy_tbs: float


@dataclass(frozen=True)
class Floor:
    """The least a call could take, in ms: by stage, in all, and with gaps between kernels."""

    stages: dict[str, float]
    total: float
    with_gaps: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """8192^3 in bf16 and 8 GB moved on a GPU; smaller, and in fp32, on a CPU. Not on zeros:
    multiplying zeros draws less power and runs faster than anything real."""
    gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    matmul = _fastest(lambda: a @ b, device)
    # A copy reads and writes: half the traffic is the size of the source.
    source = torch.randn((4 << 30 if gpu else 128 << 20) // 4, device=device)
    target = torch.empty_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    return Ceilings(2 * size**3 / matmul / 1e12, 2 * source.nbytes / copy / 1e12)


def floor(
    workload: Workload,
    model: PiZero,
    ceilings: Ceilings,
    *,
    bytes_per_weight: int = 2,
    num_steps: int = NUM_STEPS,
) -> Floor:
    """The floor of one call with one observation.

    Without the state's token: riding along with the first step it would cost next to nothing.
    """
    found = products(workload, model, num_steps=num_steps)
    stages = {
        name: 1e3
        * sum(_seconds(p, ceilings, bytes_per_weight) for p in found if p.stage in members)
        for name, members in {
            "vision": ("vision",),
            "prefix": ("prefix",),
            "expert": ("tables", "step"),
        }.items()
    }
    total = sum(stages.values())
    return Floor(stages, total, total + 1e3 * KERNEL_GAP_S * fewest_kernels(model, num_steps))


def fewest_kernels(model: PiZero, num_steps: int) -> int:
    """Kernels of a well-fused call: six a layer, five a layer of the expert and three a step."""
    depth = model.joint.depth
    return 6 * len(siglip(model).blocks) + 6 * (depth - 1) + num_steps * (5 * depth + 3)


def peak_tflops(card: str) -> float | None:
    """The datasheet's bf16 rate of a card, by its name; None if it is not in the table."""
    return next((rate for name, rate in PEAK_TFLOPS.items() if name in card), None)


def _seconds(p: Product, ceilings: Ceilings, width: int) -> float:
    return max(p.flops / ceilings.matmul_tflops, p.bytes(width) / ceilings.copy_tbs) / 1e12


def _fastest(run: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Seconds of the fastest of several runs."""
    times = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
