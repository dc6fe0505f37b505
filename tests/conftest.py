"""Fixtures that several areas share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny RLDS set that config/train_toy.yaml trains on."""
    script = REPOSITORY / "scripts" / "make_toy_data.py"
    spec = importlib.util.spec_from_file_location("make_toy_data", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_toy_data(tmp_path_factory.mktemp("toy"))
