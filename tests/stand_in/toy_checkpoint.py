"""A checkpoint folder of the toy model, for tests that only need some policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pizero.agent.checkpoint import save_checkpoint
from pizero.agent.config import build, compose_config, to_yaml, typed_root
from pizero.data.stats import Statistics, save_statistics
from pizero.data.tokenizer import train_tokenizer

SENTENCES = ("go to the left wall", "go to the right wall", "move right")


def write_toy_checkpoint(run: Path, *, seed: int = 0) -> Path:
    """Saves step 7 of a run that never happened; returns the checkpoint's folder."""
    overrides = [f"run_dir={run}", "model.vocab_size=400", "tokenizer.vocab_size=400"]
    config = typed_root(compose_config("train_toy", overrides))
    files = run / "assets"
    files.mkdir(parents=True)
    values = np.random.default_rng(seed).normal(size=(64, 4))
    statistics = {"state": Statistics.of(values), "action": Statistics.of(3 * values + 1)}
    save_statistics(statistics, files / "stats.json")
    train_tokenizer(SENTENCES, files / "tokenizer.model", vocab_size=400)
    torch.manual_seed(seed)
    model = build(config.model, path="model")
    return save_checkpoint(
        run / "checkpoints",
        step=7,
        samples=112,
        config=to_yaml(config),
        model=model,
        average=None,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        files=files,
        data={},
    )
