from __future__ import annotations

import pytest
import torch
from rlds_demo import open_demo, write_demo

from pizero.data import (
    PolicyPipeline,
    Tokenizer,
    compute_statistics,
    save_statistics,
    train_tokenizer,
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_path(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("rlds"))


@pytest.fixture
def demo(demo_path):
    return open_demo(demo_path)


@pytest.fixture(scope="session")
def assets(demo_path, tmp_path_factory):
    """A folder with stats.json and tokenizer.model of the demo dataset."""
    folder = tmp_path_factory.mktemp("assets")
    dataset = open_demo(demo_path)
    save_statistics(compute_statistics(dataset), folder / "stats.json")
    train_tokenizer(dataset.texts(), folder / "tokenizer.model", vocab_size=320)
    return folder


@pytest.fixture(scope="session")
def tokenizer(assets):
    return Tokenizer(assets / "tokenizer.model")


@pytest.fixture
def make_pipeline(assets):
    def make(**changes) -> PolicyPipeline:
        arguments = {
            "cameras": ["corner", "wrist"],
            "image_size": [16, 16],
            "tokenizer": assets / "tokenizer.model",
            "max_tokens": 24,
            "statistics": assets / "stats.json",
            "normalization": {"state": "z_score", "action": "z_score"},
            "horizon": 4,
            "action_dim": 6,
            "state_dim": 5,
        }
        return PolicyPipeline(**(arguments | changes))

    return make
