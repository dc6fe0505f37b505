"""The optimizer: parameter groups per expert, learning-rate schedules, freezing.

A schedule is a pure function of the step, so there is no scheduler state to save and a resumed run
has the same rates as one that was never stopped.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from pizero.agent.config import OptimConfig, build

Schedule = Callable[..., float]


def warmup_cosine(*, step: int, total: int, warmup: int, floor: float) -> float:
    """A line from 0 to 1 over `warmup` steps, then half a cosine down to `floor` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * _progress(step, total, warmup)))


def warmup_linear(*, step: int, total: int, warmup: int, floor: float) -> float:
    """A line from 0 to 1 over `warmup` steps, then a line down to `floor` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - floor) * _progress(step, total, warmup)


def warmup_constant(*, step: int, total: int, warmup: int) -> float:
    """A line from 0 to 1 over `warmup` steps, then 1."""
    return (step + 1) / warmup if step < warmup else 1.0


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters whose names match; returns the names.

    Refuses a pattern that matches nothing: it is almost always a misspelling.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: dict[str, None] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"freeze pattern {pattern!r} matches no parameter; close names: {', '.join(near)}"
            )
        frozen.update(dict.fromkeys(matched))
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return list(frozen)


def make_optimizer(
    config: OptimConfig, groups: Mapping[str, Sequence[nn.Parameter]]
) -> torch.optim.Optimizer:
    """The configured optimizer over the experts' parameters.

    Each group carries its expert's name and its peak rate as `base_lr`; `set_rate` scales that.
    Refuses settings for an expert the model does not have, and parameters in two groups.
    """
    groups = {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
    every = [id(p) for group in groups.values() for p in group]
    if len(every) != len(set(every)):
        raise ValueError(f"some parameters belong to two of the experts {sorted(groups)}")
    for name in config.experts:
        if name not in groups:
            near = difflib.get_close_matches(name, groups, n=1, cutoff=0)
            raise ValueError(
                f"optim.experts names {name!r}, but the model's experts are {sorted(groups)}; "
                f"did you mean {near[0]!r}?"
            )
    described = []
    for name, parameters in groups.items():
        own = config.experts.get(name)
        lr = config.lr if own is None or own.lr is None else own.lr
        decay = config.weight_decay if own is None or own.weight_decay is None else own.weight_decay
        vectors = [p for p in parameters if p.ndim < 2]
        matrices = [p for p in parameters if p.ndim >= 2]
        for members, rate in ((matrices, decay), (vectors, decay if config.decay_norms else 0.0)):
            if members:
                described.append(
                    {
                        "params": members,
                        "lr": lr,
                        "base_lr": lr,
                        "weight_decay": rate,
                        "expert": name,
                    }
                )
    if not described:
        raise ValueError("nothing to train: every parameter is frozen")
    return build(config.optimizer, path="optim.optimizer")(described)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Give every group its share of `factor`; returns the rate of each expert."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        rates[group["expert"]] = group["lr"]
    return rates


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state by parameter name: its tensors, and what is not a tensor."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        assert isinstance(parameter, nn.Parameter)
        for key, value in state.items():
            kept = tensors if isinstance(value, torch.Tensor) else values
            kept[f"{names[parameter]}:{key}"] = value
    return tensors, values


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
) -> None:
    """Put back what `optimizer_state` took. Refuses state of parameters that are not trained."""
    trained = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    for full, value in [*tensors.items(), *values.items()]:
        name, key = full.rsplit(":", 1)
        if name not in trained:
            raise ValueError(f"the checkpoint has optimizer state of {name!r}, not trained here")
        parameter = trained[name]
        if isinstance(value, torch.Tensor):
            # Step counts are scalars that stay where the optimizer made them: fused kernels on a
            # GPU want them there, the others want them on the CPU.
            fused = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
            to_cpu = value.ndim == 0 and not fused
            value = value.to("cpu" if to_cpu else parameter.device)
        optimizer.state[parameter][key] = value


def _progress(step: int, total: int, warmup: int) -> float:
    return min(1.0, (step - warmup) / max(1, total - warmup))
