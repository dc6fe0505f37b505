"""Schedules, groups, freezing, the average, draws: each against a formula or a count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pizero.agent.config import ExpertOptimConfig, OptimConfig
from pizero.agent.train import num_passes
from pizero.agent.training.ema import WeightAverage, decay_after
from pizero.agent.training.noise import flow_draws
from pizero.agent.training.optim import (
    freeze,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_rate,
    warmup_constant,
    warmup_cosine,
    warmup_linear,
)
from pizero.agent.training.progress import MetricsFile, duration
from pizero.model import BetaTime

ADAMW = {
    "_target_": "torch.optim.AdamW",
    "_partial_": True,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "fused": True,
}


def optim_config(**changed) -> OptimConfig:
    values = {
        "optimizer": ADAMW,
        "lr": 1e-3,
        "weight_decay": 0.1,
        "decay_norms": False,
        "clip_norm": 1.0,
        "experts": {},
    }
    return OptimConfig(**(values | changed))


def two_experts() -> tuple[nn.Module, dict[str, list[nn.Parameter]]]:
    model = nn.ModuleDict({"vlm": nn.Linear(3, 2), "action": nn.Linear(2, 2)})
    return model, {name: list(part.parameters()) for name, part in model.items()}


def test_cosine_schedule() -> None:
    rate = [warmup_cosine(step=s, total=110, warmup=10, floor=0.1) for s in range(111)]
    assert rate[0] == 0.1
    assert rate[9] == 1.0
    assert rate[10] == 1.0
    assert rate[60] == pytest.approx(0.55)
    assert rate[110] == pytest.approx(0.1)
    assert rate[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_linear_and_constant_schedules() -> None:
    assert warmup_linear(step=0, total=20, warmup=4, floor=0.0) == 0.25
    assert warmup_linear(step=12, total=20, warmup=4, floor=0.0) == 0.5
    assert warmup_linear(step=20, total=20, warmup=4, floor=0.2) == pytest.approx(0.2)
    assert warmup_constant(step=1, total=20, warmup=4) == 0.5
    assert warmup_constant(step=19, total=20, warmup=4) == 1.0


def test_no_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(step=0, total=5, warmup=0, floor=0.0) == 1.0
    assert warmup_linear(step=0, total=5, warmup=0, floor=0.0) == 1.0


def test_each_expert_has_its_rate_and_decay() -> None:
    _, groups = two_experts()
    config = optim_config(experts={"vlm": ExpertOptimConfig(lr=1e-4, weight_decay=0.0)})
    optimizer = make_optimizer(config, groups)
    found = {
        (g["expert"], g["params"][0].ndim): (g["lr"], g["weight_decay"])
        for g in optimizer.param_groups
    }
    assert found == {
        ("vlm", 2): (1e-4, 0.0),
        ("vlm", 1): (1e-4, 0.0),
        ("action", 2): (1e-3, 0.1),
        ("action", 1): (1e-3, 0.0),
    }
    assert set_rate(optimizer, 0.5) == {"vlm": 5e-5, "action": 5e-4}
    assert set_rate(optimizer, 0.5) == {"vlm": 5e-5, "action": 5e-4}


def test_decay_norms() -> None:
    _, groups = two_experts()
    optimizer = make_optimizer(optim_config(decay_norms=True), groups)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.1}


def test_optimizer_refuses_unknown_experts_and_doubles() -> None:
    _, groups = two_experts()
    config = optim_config(experts={"acton": ExpertOptimConfig()})
    with pytest.raises(ValueError, match=r"names 'acton'.*did you mean 'action'"):
        make_optimizer(config, groups)
    with pytest.raises(ValueError, match="belong to two of the experts"):
        make_optimizer(optim_config(), {**groups, "again": groups["vlm"][:1]})


def test_freeze_by_pattern() -> None:
    model, groups = two_experts()
    assert freeze(model, ["vlm.*"]) == ["vlm.weight", "vlm.bias"]
    trained = make_optimizer(optim_config(), groups).param_groups
    assert {g["expert"] for g in trained} == {"action"}
    with pytest.raises(ValueError, match=r"'vml\.\*' matches no parameter; close names: .*vlm"):
        freeze(model, ["vml.*"])
    freeze(model, ["*"])
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer(optim_config(), groups)


def test_optimizer_state_goes_there_and_back() -> None:
    model, groups = two_experts()
    optimizer = make_optimizer(optim_config(), groups)
    take_step(model, optimizer, gradient=0.3)
    twin, twin_groups = two_experts()
    twin.load_state_dict(model.state_dict())
    twin_names = {p: n for n, p in twin.named_parameters()}
    other = make_optimizer(optim_config(), twin_groups)
    tensors, values = optimizer_state(optimizer, {p: n for n, p in model.named_parameters()})
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    load_optimizer_state(other, twin_names, saved, values)
    take_step(model, optimizer, gradient=1.3)
    take_step(twin, other, gradient=1.3)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="optimizer state of 'ghost', not trained here"):
        load_optimizer_state(other, twin_names, {"ghost:exp_avg": torch.zeros(1)}, {})


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, *, gradient: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


def test_average_follows_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.5)
    expected = model.weight.item()
    for n, value in enumerate([1.0, -2.0, 3.0, 0.5]):
        with torch.no_grad():
            model.weight.fill_(value)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        average.update(n)
    assert average.average["weight"].item() == pytest.approx(expected, rel=1e-6)
    with average.applied():
        assert model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 0.5


def test_average_of_a_long_run_moves_in_fp32() -> None:
    # In bf16 a decay of 0.999 rounds every update away.
    model = nn.Linear(4, 4)
    start = model.weight.detach().clone()
    average = WeightAverage(model, decay=0.999)
    with torch.no_grad():
        model.weight.mul_(1.1)
    for n in range(10_000, 12_000):
        average.update(n)
    share = (average.average["weight"] - start) / (model.weight - start)
    torch.testing.assert_close(share, torch.full_like(share, 1 - 0.999**2000), rtol=1e-3, atol=0)


def test_average_leaves_frozen_weights_alone() -> None:
    model, _ = two_experts()
    freeze(model, ["vlm.*"])
    assert set(WeightAverage(model, decay=0.9).average) == {"action.weight", "action.bias"}
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got 1.0"):
        WeightAverage(model, decay=1.0)


def test_decay_warms_up() -> None:
    assert decay_after(0, 0.999) == 0.1
    assert decay_after(90, 0.999) == 0.91
    assert decay_after(10**6, 0.999) == 0.999


def draws(samples: list[int], seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return flow_draws(
        torch.tensor(samples),
        seed=seed,
        flow_samples=2,
        horizon=4,
        action_dim=3,
        time_sampler=BetaTime(),
    )


def test_draws_depend_on_the_sample_alone() -> None:
    noise, times = draws([5, 900_000_000_000, 7])
    again, times_again = draws([7, 5])
    assert torch.equal(again, noise[[2, 0]])
    assert torch.equal(times_again, times[[2, 0]])
    assert not torch.equal(noise[0], noise[2])
    other, _ = draws([5], seed=4)
    assert not torch.equal(noise[0], other[0])


def test_draws_have_the_right_distribution() -> None:
    noise, times = draws(list(range(4000)))
    assert noise.mean().abs() < 0.01
    assert (noise.std() - 1).abs() < 0.01
    # t = 0.999 (1 - z), z ~ Beta(1.5, 1) of mean 0.6
    assert (times.mean() - 0.999 * 0.4).abs() < 0.01
    neighbours = (noise[1:] * noise[:-1]).mean()
    assert neighbours.abs() < 0.01


def test_passes_of_a_global_batch() -> None:
    assert num_passes(48, world_size=1, micro_batch_size=None) == 1
    assert num_passes(48, world_size=2, micro_batch_size=8) == 3
    with pytest.raises(ValueError, match="batch_size 48 does not divide into 5 ranks"):
        num_passes(48, world_size=5, micro_batch_size=None)
    with pytest.raises(ValueError, match="2 ranks times micro batches of 7"):
        num_passes(48, world_size=2, micro_batch_size=7)


def test_metrics_are_cut_back_to_the_step_of_a_resume(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, last_step=0)
    metrics.write([{"step": s, "kind": "train", "loss": float(s)} for s in (1, 2, 3)])
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 4, "ki')  # killed while writing
    metrics = MetricsFile(path, last_step=2)
    metrics.write([{"step": 3, "kind": "train", "loss": 9.0}])
    metrics.close()
    assert path.read_text().splitlines() == [
        '{"step": 1, "kind": "train", "loss": 1.0}',
        '{"step": 2, "kind": "train", "loss": 2.0}',
        '{"step": 3, "kind": "train", "loss": 9.0}',
    ]


def test_durations_read_well() -> None:
    assert [duration(s) for s in (4.4, 65.0, 12000.0)] == [
        "4 s",
        "1 min 05 s",
        "3 h 20 min",
    ]
