"""Training on a CUDA device: bf16 autocast and compiled blocks follow the fp32 run of a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pizero.agent.config import load_config
from pizero.agent.train import TrainWorkspace
from pizero.agent.weights.folder import find_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.compile,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
QUICK = ["steps=20", "validate.frames=16", "validate.batch_size=16", "threads=1"]


def losses(toy_data: Path, folder: Path, *overrides: str) -> list[float]:
    options = [*QUICK, f"data.path={toy_data}", f"run_dir={folder}", *overrides]
    TrainWorkspace(load_config("train_toy", options)).run()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_gpu_follows_cpu(toy_data: Path, tmp_path: Path) -> None:
    expected = losses(toy_data, tmp_path / "cpu", "device=cpu")
    exact = losses(toy_data, tmp_path / "gpu", "device=cuda", "precision=fp32")
    assert exact == pytest.approx(expected, rel=1e-2)
    bf16 = losses(toy_data, tmp_path / "bf16", "device=cuda", "compile=true")
    assert bf16 == pytest.approx(expected, rel=5e-2)
    saved = load_file(find_checkpoint(tmp_path / "bf16") / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_resumed_on_a_gpu(toy_data: Path, tmp_path: Path) -> None:
    whole = losses(toy_data, tmp_path / "whole", "device=cuda")
    for _ in range(2):
        parts = losses(toy_data, tmp_path / "parts", "device=cuda", "max_minutes=0", "log_every=10")
    assert parts == pytest.approx(whole, rel=1e-2)
    assert len(parts) == len(whole) == 20
