"""What must hold of speed on any machine, checked without a clock.

Operation counts, weights, calls, graphs, saved bytes and waits are exact on a CPU, where a
millisecond says nothing. Each check measures one thing and states what was expected of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch._subclasses import FakeTensorMode

from bench.counting import (
    CountingBackend,
    SavedBytes,
    count_flops,
    count_operations,
    counted_calls,
)
from bench.workloads import (
    NUM_STEPS,
    STAGES,
    WORKLOADS,
    Workload,
    build_model,
    make_batch,
    make_noise,
    make_observation,
    products,
    stage_flops,
)
from pizero.model import PiZero
from pizero.types import Batch


@dataclass(frozen=True)
class Check:
    """One thing measured; `why` explains what was expected where that is not plain."""

    group: str
    name: str
    measured: str
    expected: str
    ok: bool
    why: str = ""


def exact(group: str, name: str, measured: int, expected: int, why: str = "") -> Check:
    return Check(group, name, f"{measured:,}", f"{expected:,}", measured == expected, why)


def at_most(
    group: str, name: str, measured: float, budget: float, unit: str, why: str = ""
) -> Check:
    return Check(
        group, name, f"{measured:.4g} {unit}", f"<= {budget:.4g} {unit}", measured <= budget, why
    )


# --- weights ----------------------------------------------------------------------------------

SIGLIP, PROJECTOR, EMBEDDING = 412_442_352, 2_361_344, 526_647_296
GEMMA_2B, GEMMA_300M = 1_981_884_416, 311_464_960
# What the vlm's last layer has beyond keys and values, and its final norm: nobody reads it.
UNREAD_TAIL = 109_056_000
NORMS_OF_EXPERT, ADAPTIVE_NORMS = 37 * 1024, 37 * (1024 * 3 * 1024 + 3 * 1024)
PUBLISHED_WEIGHTS = {
    "pi0": {
        "vision": SIGLIP,
        "projector": PROJECTOR,
        "embedding": EMBEDDING,
        "vlm": GEMMA_2B - UNREAD_TAIL,
        "action": GEMMA_300M,
        "action, state and time layers": 3_248_160,
    },
    "pi05": {
        "vision": SIGLIP,
        "projector": PROJECTOR,
        "embedding": EMBEDDING,
        "vlm": GEMMA_2B - UNREAD_TAIL,
        "action": GEMMA_300M - NORMS_OF_EXPERT + ADAPTIVE_NORMS,
        "action, state and time layers": 2 * (1024 + 1) * 1024 + 33 * 1024 + 1025 * 32,
    },
}


def weights(workloads: Iterable[Workload]) -> list[Check]:
    """Weights of every part of the full models equal the published numbers."""
    checks = []
    for name in sorted({w.model for w in workloads}):
        with FakeTensorMode():
            model = build_model(next(w for w in WORKLOADS.values() if w.model == name))
        parts = {
            "vision": [model.vision],
            "projector": [model.projector],
            "embedding": [model.embedding],
            "vlm": [model.joint.mixtures[model.vlm]],
            "action": [model.joint.mixtures[model.action]],
            "action, state and time layers": [
                m
                for m in (model.action_encoder, model.action_decoder, model.state_encoder)
                if m is not None
            ],
        }
        for part, modules in parts.items():
            count = sum(p.numel() for m in modules for p in m.parameters())
            why = "without the 109,056,000 of the unread tail" if part == "vlm" else ""
            expected = PUBLISHED_WEIGHTS[name][part]
            checks.append(exact("weights", f"{name} {part}", count, expected, why))
        total, parts_sum = (
            sum(p.numel() for p in model.parameters()),
            sum(PUBLISHED_WEIGHTS[name].values()),
        )
        checks.append(exact("weights", f"{name} in all", total, parts_sum))
    return checks


# --- floating-point operations -----------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The published rule of thumb (multiply-add = 2), and what it leaves out, by name."""

    published: float
    left_out: dict[str, int]

    @property
    def total(self) -> float:
        return self.published + sum(self.left_out.values())


def recipes(workload: Workload, model: PiZero) -> dict[str, Recipe]:
    """For pictures, prefix and one expert step of a full-size model.

    220.2 GF for each picture, 3.745 GF P + 139,264 P^2 for P prefix tokens (last layer: keys and
    values alone), 0.627 GF S + 147,456 S (P + S) for a chunk of S.
    """
    images = workload.num_cameras
    p, s = 256 * images + workload.num_words, workload.horizon
    found = products(workload, model, num_steps=1)
    prefix_extra, step_extra = {}, {"flow time": stage_flops(found, "tables")}
    if model.state_dim is not None:
        prefix_extra["state token"] = stage_flops(found, "state")
        step_extra["state key"] = 147_456 * s
    else:
        # pi0's tokens pass two square matrices that pi0.5's do not.
        step_extra["no mixing in pi0.5"] = -2 * 2 * 1024 * 1024 * s
    return {
        "vision": Recipe(220.2e9 * images, {}),
        "prefix": Recipe(3.745e9 * p + 139_264 * p**2, prefix_extra),
        "expert step": Recipe(0.627e9 * s + 147_456 * s * (p + s), step_extra),
    }


def flops(workloads: Iterable[Workload], *, size: str = "full") -> list[Check]:
    """Counted operations equal the recipe within 0.1 %, and the list of products exactly."""
    checks = []
    for workload in workloads:
        with FakeTensorMode():
            model = build_model(workload, size=size)
            observation = make_observation(workload, model, batch=1, seed=0)
            noise = make_noise(model, batch=1, seed=0)
            if size == "full":
                checks += _against_recipe(workload, model, observation, noise)
            counted = count_flops(partial(model.sample, observation, noise, 2))
        found = products(workload, model, num_steps=2)
        expected = sum(stage_flops(found, stage) for stage in STAGES)
        name = f"{workload.name} call of two steps"
        checks.append(exact("FLOPs", name, counted, expected, "every product, none wasted"))
    return checks


def _against_recipe(workload: Workload, model: PiZero, observation, noise) -> list[Check]:
    with torch.no_grad():
        cache = model.prefix(observation)
    time = torch.full((1,), 0.3)
    counted = {"vision": count_flops(lambda: model.embed_prefix(observation))}
    if model.state_dim is not None:
        counted["vision"] -= 2 * model.state_dim * model.action_encoder.in_proj.out_features
    counted["prefix"] = count_flops(lambda: model.prefix(observation)) - counted["vision"]
    counted["expert step"] = count_flops(lambda: model.velocity(cache, noise, time))
    checks = []
    for stage, recipe in recipes(workload, model).items():
        ratio = counted[stage] / recipe.total - 1
        left_out = ", ".join(f"{name} {n / 1e9:+.3f}" for name, n in recipe.left_out.items())
        plain = f"plain recipe {recipe.published / 1e9:,.2f} GF"
        checks.append(
            Check(
                "FLOPs",
                f"{workload.name} {stage}",
                f"{counted[stage] / 1e9:,.3f} GF ({ratio:+.3%})",
                f"{recipe.total / 1e9:,.3f} GF within 0.1 %",
                abs(ratio) <= 1e-3,
                f"{plain}; {left_out} GF" if left_out else plain,
            )
        )
    return checks


# --- calls, waits, operations --------------------------------------------------------------------


def calls(workloads: Iterable[Workload]) -> list[Check]:
    """Pictures are seen once and the prefix runs once, however many steps or flow samples."""
    checks = []
    for workload in workloads:
        with FakeTensorMode():
            model, batch = _small(workload)
            for name, run, suffixes in _both(model, batch, samples=4, steps=NUM_STEPS):
                with counted_calls(model.vision) as seen, counted_calls(model.joint) as joint:
                    run()
                prefixes = [args for args, kwargs in joint if kwargs.get("cache") is None]
                rows = next(iter(prefixes[0][0].values())).shape[0]
                pictures = seen[0][0][0].shape[0]
                name = f"{workload.name} {name}"
                checks += [
                    exact("calls", f"{name}: vision", len(seen), 1),
                    exact("calls", f"{name}: pictures", pictures, 2 * workload.num_cameras),
                    exact("calls", f"{name}: prefix", len(prefixes), 1),
                    exact("calls", f"{name}: rows of the prefix", rows, 2),
                    exact("calls", f"{name}: suffix", len(joint) - len(prefixes), suffixes),
                ]
    return checks


def waits(workloads: Iterable[Workload]) -> list[Check]:
    """Nothing in sampling or loss reads a value on the host or makes a tensor there, with masks
    for absent cameras and padding and without."""
    checks = []
    for workload in workloads:
        with FakeTensorMode():
            model, batch = _small(workload)
            masked = replace(
                batch.observation,
                image_mask=torch.ones(2, workload.num_cameras, dtype=torch.bool),
                token_mask=torch.ones(2, workload.num_words, dtype=torch.bool),
            )
            for kind, observation in (("", batch.observation), (", masked", masked)):
                varied = replace(batch, observation=observation)
                for name, run, _ in _both(model, varied, samples=2, steps=2):
                    syncs = count_operations(run).syncs
                    why = ", ".join(f"{n} x {count}" for n, count in syncs.items())
                    name = f"{workload.name} {name}{kind}"
                    checks.append(exact("waits", name, syncs.total(), 0, why))
    return checks


# Kernels that eager PyTorch launches for one layer of the expert in one Euler step. A budget: lower
# it when a change saves some, raise it only with a reason.
KERNELS_PER_LAYER = {"pi0": 40, "pi05": 44}


def operations(workloads: Iterable[Workload]) -> list[Check]:
    """Kernels per layer of the expert in one Euler step, from calls that differ in depth or steps.

    What a step adds does not include the flow time's tables, which are made once for all steps.
    """
    checks = []
    for name in sorted({w.model for w in workloads}):
        workload = next(w for w in WORKLOADS.values() if w.model == name and w.horizon == 50)
        a_step = {depth: _kernels_of_a_step(workload, depth) for depth in (2, 3)}
        layer = a_step[3] - a_step[2]
        why = ", ".join(f"{op} {n}" for op, n in layer.most_common(9))
        budget = KERNELS_PER_LAYER[name]
        check = at_most("kernels", f"{name} layer of the expert", layer.total(), budget, "", why)
        checks.append(check)
    return checks


def _kernels_of_a_step(workload: Workload, depth: int) -> Counter[str]:
    with FakeTensorMode():
        model, batch = _small(workload, depth=depth)
        noise = make_noise(model, batch=2, seed=0)
        counts = [
            count_operations(partial(model.sample, batch.observation, noise, steps)).kernels
            for steps in (1, 2)
        ]
    return counts[1] - counts[0]


def _small(workload: Workload, depth: int | None = None) -> tuple[PiZero, Batch]:
    model = build_model(workload, size="small", depth=depth)
    return model, make_batch(workload, model, batch=2, seed=0)


def _both(
    model: PiZero, batch: Batch, *, samples: int, steps: int
) -> list[tuple[str, Callable, int]]:
    """Sampling and loss: name, call, and how often the suffix should run."""
    noise = make_noise(model, batch=2, seed=0)
    many = make_noise(model, batch=2, seed=0, samples=samples)
    time = torch.full((2, samples), 0.3)
    return [
        ("sampling", partial(model.sample, batch.observation, noise, steps), steps),
        (f"loss of {samples}", partial(model, batch.observation, batch.actions, many, time), 1),
    ]


# --- graphs -----------------------------------------------------------------------------------


def graphs(workloads: Iterable[Workload]) -> list[Check]:
    """Loss and sampling are one graph each, and meeting a shape again compiles nothing.

    Shallow models: a graph break or a recompilation does not depend on depth.
    """
    checks = []
    for workload in workloads:
        torch.compiler.reset()
        model = build_model(workload, size="small", depth=2)
        sampling, loss = CountingBackend(), CountingBackend()
        sample = torch.compile(model.sample, fullgraph=True, dynamic=False, backend=sampling)
        forward = torch.compile(model.__call__, fullgraph=True, dynamic=False, backend=loss)
        for seed in range(2):
            batch = make_batch(workload, model, batch=1, seed=seed)
            with torch.no_grad():
                sample(batch.observation, make_noise(model, batch=1, seed=seed), 2)
            many = make_noise(model, batch=1, seed=seed, samples=2)
            forward(batch.observation, batch.actions, many, torch.full((1, 2), 0.1 + seed / 2))
        why = "fullgraph: a break is an error; two calls with other values"
        checks += [
            exact("graphs", f"{workload.name} sampling", sampling.graphs, 1, why),
            exact("graphs", f"{workload.name} loss", loss.graphs, 1, why),
        ]
        torch.compiler.reset()
        regional = CountingBackend()
        model.compile_blocks(backend=regional)
        for seed in range(2):
            batch = make_batch(workload, model, batch=2, seed=seed)
            many = make_noise(model, batch=2, seed=seed, samples=2)
            model(batch.observation, batch.actions, many, torch.full((2, 2), 0.1 + seed / 2))
        why = "a vision layer; a layer of the prefix, its last one, a layer of the suffix"
        checks.append(exact("graphs", f"{workload.name} loss by layers", regional.graphs, 4, why))
    torch.compiler.reset()
    return checks


# --- memory -----------------------------------------------------------------------------------

# GB that one more observation keeps for the backward pass: fp32 weights, bf16 arithmetic, eager,
# fused attention. Not what a GPU needs after compiling, which keeps less; a guard against growth.
SAVED_GB = {"A": 1.25, "B": 3.68, "C": 4.01, "D": 2.58}


def saved(workloads: Iterable[Workload]) -> list[Check]:
    """Bytes kept for the backward pass at full size, without allocating any."""
    checks = []
    for workload in workloads:
        with FakeTensorMode():
            model = build_model(workload)
            # The difference of two batches leaves out weights in bf16, kept once.
            kept = [_saved_bytes(workload, model, rows) for rows in (1, 2)]
        gigabytes, budget = (kept[1] - kept[0]) / 1e9, SAVED_GB[workload.name]
        checks.append(at_most("memory", f"{workload.name} per sample", gigabytes, budget, "GB"))
    return checks


def _saved_bytes(workload: Workload, model: PiZero, rows: int) -> int:
    batch = make_batch(workload, model, batch=rows, seed=0)
    noise = make_noise(model, batch=rows, seed=0, samples=1)
    with SavedBytes(model) as kept, torch.autocast("cpu", torch.bfloat16):
        model(batch.observation, batch.actions, noise, torch.zeros(rows, 1))
    return kept.total


GROUPS: dict[str, Callable[[Iterable[Workload]], list[Check]]] = {
    "weights": weights,
    "FLOPs": flops,
    "calls": calls,
    "waits": waits,
    "kernels": operations,
    "memory": saved,
    "graphs": graphs,
}
