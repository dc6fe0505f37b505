"""What a tracker is told, and what the Weights & Biases one makes of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pizero.agent.config import load_config
from pizero.agent.train import TrainWorkspace
from pizero.agent.training.tracking import Example, WandbTracker, chunk_plot, strip


class Recorder:
    """A tracker that remembers; `heard` is shared as the config makes the object."""

    heard: list[tuple[str, Any]] = []  # noqa: RUF012

    def start(self, *, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self.heard.append(("start", (name, config["steps"])))

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.heard.extend((row["kind"], row["step"]) for row in rows)

    def show(self, step: int, examples: Sequence[Example]) -> None:
        self.heard.append(("show", (step, examples[0].images.shape, examples[0].recorded.shape)))

    def finish(self) -> None:
        self.heard.append(("finish", None))


def example() -> Example:
    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    return Example(images=images, predicted=np.zeros((3, 2)), recorded=np.ones((3, 2)))


def test_tracker_hears_the_run(toy_data: Path, tmp_path: Path) -> None:
    Recorder.heard.clear()
    options = ["steps=2", "threads=1", "validate.frames=8", "validate.batch_size=8", "log_every=1"]
    places = [f"data.path={toy_data}", f"run_dir={tmp_path}"]
    tracker = f"+tracker={{_target_: {__name__}.Recorder}}"
    TrainWorkspace(load_config("train_toy", [*options, *places, tracker])).run()
    assert Recorder.heard == [
        ("start", ("toy", 2)),
        ("train", 1),
        ("train", 2),
        ("val", 2),
        ("show", (2, (2, 3, 16, 16), (4, 4))),
        ("finish", None),
    ]


def test_wandb_run_is_continued_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        define_metric=lambda name, step_metric: calls.append(("metric", step_metric)),
        log=lambda row: calls.append(("log", row)),
        finish=lambda: calls.append(("finish", None)),
    )
    fake = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)) or run,
        Image=lambda array: array.shape,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        tracker = WandbTracker(project="p", entity=None, mode="offline")
        tracker.start(folder=tmp_path, name="toy", config={"steps": 2})
        tracker.log([{"step": 1, "kind": "train", "loss": 2.0}])
    tracker.show(1, [example()])
    first, second = (options for name, options in calls if name == "init")
    assert first["id"] == second["id"]
    assert first["mode"] == "offline"
    assert ("log", {"step": 1, "train/loss": 2.0}) in calls
    shown = calls[-1][1]
    assert shown["val/seen"] == [(4, 10, 3)]
    assert shown["val/chunks"][0][2] == 3


def test_wandb_mode_is_checked() -> None:
    with pytest.raises(ValueError, match="mode must be offline or online, got 'of'"):
        WandbTracker(project="p", entity=None, mode="of")


def test_pictures_stand_side_by_side() -> None:
    images = example().images
    joined = strip(images)
    assert joined.shape == (4, 10, 3)
    assert np.array_equal(joined[:, 5:], images[1].transpose(1, 2, 0))


def test_chunk_plot_is_a_picture() -> None:
    picture = chunk_plot(example())
    assert picture.dtype == np.uint8
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_without_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = WandbTracker(project="p", entity=None, mode="offline")
    with pytest.raises(ValueError, match=r"needs wandb: pip install 'pizero\[tracking\]'"):
        tracker.start(folder=tmp_path, name="toy", config={})
