"""Sets of different robots in one run: own statistics, padding that does not count, one to act."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rlds_demo import KEYS, write_demo

import pizero
from pizero.agent.config import TrainConfig, load_config
from pizero.agent.train import Trainer, TrainWorkspace
from pizero.agent.training.distributed import Ranks, StopSignals
from pizero.agent.weights.folder import find_checkpoint
from pizero.data import compute_statistics, load_statistics
from pizero.data.lerobot import LeRobotDataset, export_episodes

QUICK = [
    "threads=1",
    "steps=2",
    "batch_size=16",
    "flow_samples=1",
    "model.state_dim=6",
    "validate={every: 2, frames: 16, batch_size: 8, euler_steps: 2}",
    "checkpoint={every: 2}",
    "data.augment=null",
]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A set of five state entries in RLDS form, and one of four as LeRobot writes it."""
    folder = tmp_path_factory.mktemp("sets")
    rlds = write_demo(folder / "rlds")
    recorded = folder / "recorded"
    export_episodes(
        {"train": pizero.data.RldsDataset(path=rlds, split="train", horizon=1, **KEYS)},
        recorded,
        fps=20,
        images="parquet",
    )
    return {"rlds": rlds, "recorded": recorded}


def configure(sets: dict[str, Path], folder: Path, *overrides: str) -> TrainConfig:
    split: dict[str, Any] = {"_target_": "pizero.data.dataset.RldsDataset", "horizon": 4} | KEYS
    split |= {"path": str(sets["rlds"])}
    split |= {"state": ["observation/state", "observation/gripper"]}
    other = {
        "_target_": "pizero.data.lerobot.LeRobotDataset",
        "path": str(sets["recorded"]),
        "horizon": 4,
        "cameras": {name: f"observation.images.{name}" for name in KEYS["cameras"]},
    }

    def mix(name: str) -> dict[str, Any]:
        datasets = {"five": split | {"split": name}, "four": other}
        node = {"_target_": "pizero.data.mix.Mix", "datasets": datasets}
        return node | {"weights": {"five": 3.0, "four": 1.0}}

    config = load_config(
        "train_toy", [*QUICK, f"data.path={sets['rlds']}", f"run_dir={folder}", *overrides]
    )
    config.data.train, config.data.val = mix("train"), mix("val")
    config.pipelines = {"four": {"normalization": {"state": "identity", "action": "identity"}}}
    return config


def test_each_set_has_its_own_statistics_and_pipeline(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    config = configure(sets, tmp_path)
    trainer = Trainer(
        config,
        ranks=Ranks(rank=0, world_size=1, device=torch.device("cpu")),
        signals=StopSignals(),
    )
    five, four = (load_statistics(tmp_path / "stats.json", dataset=n) for n in ("five", "four"))
    assert (five["state"].size, four["state"].size) == (5, 4)
    data = LeRobotDataset(
        path=sets["recorded"], horizon=4, cameras={"corner": "observation.images.corner"}
    )
    np.testing.assert_allclose(four["state"].mean, compute_statistics(data)["state"].mean)
    batch = next(iter(trainer.loader))
    state = batch.observation.state
    assert state is not None
    source, _ = trainer.loader._source.mix.locate(
        trainer.loader._source.order, batch.sample.numpy()
    )
    assert set(source.tolist()) == {0, 1}
    raw = state[:, -1][source == 1]  # not normalised: [episode, step, 0, 0], padded
    assert (raw[:, 2:] == 0).all()
    assert (raw == raw.round()).all()
    assert not (state[:, -1][source == 0][:, :2] == state[:, -1][source == 0][:, :2].round()).all()
    assert (state[..., 5:] == 0).all()


def test_a_checkpoint_acts_as_one_of_its_sets(sets: dict[str, Path], tmp_path: Path) -> None:
    TrainWorkspace(configure(sets, tmp_path)).run()
    policy = pizero.load_policy(tmp_path, asset="five")
    picture = np.zeros((16, 16, 3), np.uint8)
    pictures = {"corner": picture, "wrist": picture}
    assert policy.act(images=pictures, text="do task 1", state=np.zeros(5)).shape == (4, 4)
    with pytest.raises(ValueError, match="a pipeline for each of five, four; name one"):
        pizero.load_policy(tmp_path)
    with pytest.raises(ValueError, match="expected dataset to be one of five, four, got 'fiv'"):
        pizero.load_policy(tmp_path, asset="fiv")
    # The next sitting takes what was learnt from the checkpoint.
    before = (tmp_path / "stats.json").read_bytes()
    TrainWorkspace(configure(sets, tmp_path, "steps=4", "resume=changed")).run()
    assert (tmp_path / "stats.json").read_bytes() == before
    assert find_checkpoint(tmp_path).name == "step_00000004"


def test_mistakes_in_pipelines(sets: dict[str, Path], tmp_path: Path) -> None:
    config = configure(sets, tmp_path)
    config.pipelines = {"for": {}}
    with pytest.raises(ValueError, match=r"the mix \(in pipelines\) has no 'for'; did you mean"):
        TrainWorkspace(config).run()
    config.pipelines = None
    with pytest.raises(ValueError, match="expected data sets of one width, got"):
        TrainWorkspace(config).run()
