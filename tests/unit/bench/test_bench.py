"""The benchmarks measure what they say: they notice waste, disagreement and waiting."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bench import __main__ as command
from bench import contenders, infer, invariants, report, train
from bench.counting import CountingBackend, SavedBytes, count_operations, counted_calls
from bench.roofline import Ceilings, floor, peak_tflops
from bench.workloads import WORKLOADS, build_model, products, stage_flops
from pizero.model import PiZero

TINY_RUN = ["--size", "small", "--device", "cpu", "--rounds", "1", "--warmup", "0"]


@pytest.mark.parametrize(("name", "published"), [("A", 3.1), ("B", 6.4), ("C", 7.1), ("D", 4.8)])
def test_floors_are_those_published_for_an_h200(name, published):
    with torch.device("meta"):
        model = build_model(WORKLOADS[name])
    found = floor(WORKLOADS[name], model, Ceilings(matmul_tflops=790, copy_tbs=4.3))
    assert found.total == pytest.approx(published, abs=0.1)
    # 27 x 6 + 17 x 6 + 10 x (18 x 5 + 3) kernels of 1.3 microseconds
    assert found.with_gaps - found.total == pytest.approx(1194 * 1.3e-3)


def test_full_models_have_the_published_weights():
    assert all(check.ok for check in invariants.weights(WORKLOADS.values()))


@pytest.mark.parametrize("name", ["A", "C"])
def test_no_product_is_wasted(name):
    checks = invariants.flops([WORKLOADS[name]], size="small")
    assert [c.ok for c in checks] == [True]


def test_a_wasted_prefix_is_noticed(monkeypatch):
    sample = PiZero.sample

    def wasteful(self, observation, noise, num_steps):
        self.prefix(observation)
        return sample(self, observation, noise, num_steps)

    monkeypatch.setattr(PiZero, "sample", wasteful)
    assert [c.ok for c in invariants.flops([WORKLOADS["A"]], size="small")] == [False]
    assert {c.name: c.ok for c in invariants.calls([WORKLOADS["A"]])}["A sampling: vision"] is False


@pytest.mark.parametrize("group", ["calls", "waits", "kernels"])
def test_invariants_hold(group):
    failed = [c for c in invariants.GROUPS[group]([WORKLOADS["B"]]) if not c.ok]
    assert failed == []


def test_one_picture_costs_what_the_recipe_says():
    with torch.device("meta"):
        model = build_model(WORKLOADS["A"])
    assert stage_flops(products(WORKLOADS["A"], model), "vision") == 220_176_580_608


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_waiting_is_noticed(wait):
    x = torch.arange(3.0)
    assert count_operations(lambda: x * 2 + 1).syncs.total() == 0
    assert count_operations(lambda: wait(x)).syncs.total() > 0


def test_views_are_no_kernels():
    x = torch.ones(4, 4)
    counter = count_operations(lambda: (x.view(-1, 2).t()[0] * 2).detach())
    assert counter.kernels == {"mul": 1}


def test_saved_bytes_leave_out_weights_and_count_a_storage_once():
    layer, x = nn.Linear(8, 8, bias=False), torch.ones(2, 8)
    with SavedBytes(layer) as kept:
        h = layer(x)
        (h * h.view(2, 8)).sum()
    assert kept.total == x.nbytes + h.nbytes


def test_calls_are_counted_only_while_asked():
    layer = nn.Linear(2, 2)
    with counted_calls(layer) as calls:
        layer(torch.ones(1, 2))
    layer(torch.ones(1, 2))
    assert len(calls) == 1


@pytest.mark.compile
def test_graphs_are_counted():
    backend = CountingBackend()
    double = torch.compile(lambda x: 2 * x, backend=backend, dynamic=False)
    for size in (2, 3, 2):
        double(torch.ones(size))
    assert backend.graphs == 2


def test_transformers_computes_the_same_actions(tmp_path):
    out = tmp_path / "infer.json"
    wanted = ["pizero-eager", "transformers", "pizero-graph"]
    arguments = [*TINY_RUN, "--calls", "2", "--inputs", "2", "--steps", "3", "--out", str(out)]
    assert infer.main([*arguments, "--workload", "A", "--contenders", *wanted]) == 0
    result = json.loads(out.read_text())
    entries = result["contenders"]
    assert 0 < entries["transformers"]["difference"] < 1e-4
    assert entries["pizero-eager"]["times_first"]["median"] == 1
    assert "CUDA" in entries["pizero-graph"]["skipped"]
    assert result["smoke"] is True


def test_who_disagrees_is_not_timed(monkeypatch, tmp_path):
    def wrong(setting):
        return lambda observation, noise: contenders.eager(setting)(observation, noise) * 1.01

    monkeypatch.setitem(contenders.CONTENDERS, "transformers", wrong)
    arguments = [*TINY_RUN, "--calls", "2", "--steps", "1", "--out", str(tmp_path / "x.json")]
    assert infer.main([*arguments, "--contenders", "pizero-eager", "transformers"]) == 1
    entry = json.loads((tmp_path / "x.json").read_text())["contenders"]["transformers"]
    assert "differ" in entry["disagrees"]
    assert "on_device_ms" not in entry


def test_training_reports_every_arm(tmp_path):
    out = tmp_path / "train.json"
    arguments = [*TINY_RUN, "--calls", "1", "--batch", "1", "--no-compile", "--out", str(out)]
    assert train.main([*arguments, "--workload", "A"]) == 0
    arms = json.loads(out.read_text())["arms"]
    assert list(arms) == ["eager, 1 flow samples", "eager, 4 flow samples"]
    for arm in arms.values():
        assert arm["samples_per_s"] > 0
        assert arm["mfu_percent"] is None


def test_flow_samples_cost_the_expert_alone():
    workload = WORKLOADS["B"]
    with torch.device("meta"):
        model = build_model(workload)
    one, four = (train.train_flops(workload, model, samples) for samples in (1, 4))
    assert four / one == pytest.approx(1.03, abs=0.005)


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_code_tells_of_failure(ok, monkeypatch, tmp_path, capsys):
    check = invariants.Check("calls", "made up", "1", "1", ok)
    monkeypatch.setattr(command, "GROUPS", {"calls": lambda workloads: [check]})
    out = tmp_path / "invariants.json"
    assert command.main(["--out", str(out)]) == (0 if ok else 1)
    assert json.loads(out.read_text())["checks"][0]["ok"] is ok
    assert f"{int(ok)} of 1 hold" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["invariants.json"]


def test_cards_are_found_by_name():
    assert peak_tflops("NVIDIA H200") == 989
    assert peak_tflops("NVIDIA H20") == 148
    assert peak_tflops("x86_64 CPU") is None


def test_result_files_are_named_after_benchmark_and_card():
    assert report.result_path("infer-B", "NVIDIA H200").name.startswith("infer-B-h200-20")


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match=r"size must be one of .*'small'.* got 'huge'"):
        build_model(WORKLOADS["A"], size="huge")
    with pytest.raises(ValueError, match="no contender 'jax'; known: pizero-eager"):
        contenders.contender("jax", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said(capsys):
    with pytest.raises(SystemExit):
        infer.main([])
    assert "--size small --device cpu" in capsys.readouterr().err
