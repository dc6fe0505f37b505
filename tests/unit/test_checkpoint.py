"""Checkpoints: whole or absent, self-describing, and strict about what belongs together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pizero.agent.checkpoint import (
    clean,
    load_checkpoint,
    load_weights,
    prune,
)
from pizero.agent.config import load_config
from pizero.agent.train import TrainWorkspace
from pizero.agent.weights.folder import (
    checkpoints,
    find_checkpoint,
    model_weights,
    newest_checkpoint,
)


@pytest.fixture(scope="module")
def run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    options = ["steps=2", "threads=1", "validate.frames=16", "validate.batch_size=16"]
    places = [f"data.path={toy_data}", f"run_dir={folder}"]
    TrainWorkspace(load_config("train_toy", [*options, *places])).run()
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A checkpoint folder to tamper with."""
    import shutil

    return Path(shutil.copytree(find_checkpoint(run), tmp_path / "step_00000002"))


def test_loads_from_the_folder_alone(copy: Path) -> None:
    config, model, pipeline, metadata = load_checkpoint(copy)
    assert metadata["step"] == 2
    assert metadata["samples"] == 32
    assert config.model.horizon == model.horizon == pipeline.horizon
    stored = load_file(copy / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name]), name
    assert not model.training


@pytest.mark.parametrize("inside", ["", "checkpoints/latest", "checkpoints/step_00000002"])
def test_finds_the_checkpoint_of_a_run(run: Path, inside: str) -> None:
    assert find_checkpoint(run / inside).name == "step_00000002"


def test_newest_is_found_without_the_link(run: Path, tmp_path: Path) -> None:
    import shutil

    root = Path(shutil.copytree(run, tmp_path / "run", symlinks=True)) / "checkpoints"
    (root / "latest").unlink()
    (root / ".writing_step_00000003").mkdir()
    assert find_checkpoint(root.parent) == root / "step_00000002"
    assert newest_checkpoint(root) == root / "step_00000002"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*metadata\.json"):
        find_checkpoint(tmp_path)


def test_changed_model_is_refused_with_both_values(copy: Path) -> None:
    path = copy / "config.yaml"
    text = path.read_text()
    assert text.count("max_period: 4.0") == 1
    path.write_text(text.replace("max_period: 4.0", "max_period: 100.0"))
    message = r"model.time_embedding.max_period is 4.0 in metadata.json and 100.0 in config.yaml"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(copy)


def test_changed_rope_base_is_refused_with_both_values(copy: Path) -> None:
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("rope_base: 10000.0", "rope_base: 100.0", 1))
    with pytest.raises(ValueError, match=r"vlm.rope_base is 10000.0 in .* and 100.0 in"):
        load_checkpoint(copy)


def test_changed_statistics_are_refused(copy: Path) -> None:
    path = copy / "stats.json"
    tree = json.loads(path.read_text())
    tree["norm_stats"]["state"]["mean"][0] += 1
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"stats.json had digest \w+ when it was saved and has"):
        load_checkpoint(copy)


def test_lost_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.model had digest \w+ .* has None now"):
        load_checkpoint(copy)


def test_weights_that_do_not_fit_are_listed(copy: Path) -> None:
    path = copy / "model.safetensors"
    weights = load_file(path)
    weights["action_decoder.bias"] = torch.zeros(9)
    weights["extra.weight"] = weights.pop("action_decoder.weight")
    save_file(weights, path)
    with pytest.raises(ValueError, match="does not fit in 3 places") as caught:
        load_checkpoint(copy)
    text = str(caught.value)
    assert "action_decoder.bias: shape [9] does not give [4]" in text
    assert "the model has no extra.weight" in text
    assert "action_decoder.weight: missing" in text


def test_other_format_is_refused(copy: Path) -> None:
    path = copy / "metadata.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(ValueError, match="has format 7, this version reads 1"):
        load_checkpoint(copy)


def test_code_from_elsewhere_is_not_run(copy: Path) -> None:
    for name in ("config.yaml", "metadata.json"):
        path = copy / name
        path.write_text(path.read_text().replace("pizero.model.PiZero", "shutil.rmtree"))
    with pytest.raises(ValueError, match=r"'shutil.rmtree' is outside \['pizero'\]"):
        load_checkpoint(copy)


def test_shared_weights_are_stored_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    stored = model_weights(model)
    assert set(stored) == {"a.weight", "a.bias", "b.bias"}
    load_weights(model, {name: torch.ones_like(t) for name, t in stored.items()}, "here")
    assert model["b"].weight.eq(1).all()


def test_pruning_and_cleaning(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"step_{step:08d}" / "training").mkdir(parents=True)
    prune(tmp_path, keep_last=2, keep_every=4)
    assert [p.name for p in checkpoints(tmp_path)] == [f"step_{n:08d}" for n in (4, 8, 10)]
    (tmp_path / ".writing_step_00000012").mkdir()
    (tmp_path / ".deleting_step_00000002").mkdir()
    (tmp_path / ".writing_latest").symlink_to("step_00000010")
    clean(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "step_00000010").is_dir()
