"""Weights & Biases as an optional second home of the metrics; wandb is imported only when used.

A tracker hears everything metrics.jsonl records, and sees a few held-out frames with the predicted
and the recorded chunk. Any class with these four methods can stand in its place (`tracker=`).
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Example:
    """One held-out frame: its pictures uint8 [n 3 h w], and chunks [horizon dim] in robot units."""

    images: np.ndarray
    predicted: np.ndarray
    recorded: np.ndarray


@runtime_checkable
class Tracker(Protocol):
    """Where else the metrics go."""

    def start(self, *, folder: Path, name: str, config: Mapping[str, Any]) -> None: ...

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def show(self, step: int, examples: Sequence[Example]) -> None: ...

    def finish(self) -> None: ...


class WandbTracker:
    """A Weights & Biases run. `mode` offline needs no account: `wandb sync` uploads it later."""

    def __init__(self, *, project: str, entity: str | None, mode: str) -> None:
        if mode not in ("offline", "online"):
            raise ValueError(f"mode must be offline or online, got {mode!r}")
        self.project, self.entity = project, entity
        self.is_offline = mode == "offline"
        self._run: Any = None

    def start(self, *, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        """Open the run, or continue the one this run folder began."""
        wandb = _wandb()
        remembered = folder / "wandb_id"
        if not remembered.exists():
            remembered.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode="offline" if self.is_offline else "online",
            name=name,
            dir=folder,
            config=dict(config),
            id=remembered.read_text(),
            resume="allow",
        )
        # The step of each row, not wandb's own count, which cannot go back after a resume.
        self._run.define_metric("*", step_metric="step")

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of metrics.jsonl, named kind/metric."""
        for row in rows:
            kind = row["kind"]
            values = {f"{kind}/{k}": v for k, v in row.items() if k not in ("step", "kind")}
            self._run.log({"step": row["step"], **values})

    def show(self, step: int, examples: Sequence[Example]) -> None:
        """Send what the policy saw, and its chunk beside the recorded one."""
        wandb = _wandb()
        pictures = [wandb.Image(strip(example.images)) for example in examples]
        chunks = [wandb.Image(chunk_plot(example)) for example in examples]
        self._run.log({"step": step, "val/seen": pictures, "val/chunks": chunks})

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()


def _wandb() -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError("the tracker needs wandb: pip install 'pizero[tracking]'") from error
    return wandb


def strip(images: np.ndarray) -> np.ndarray:
    """Pictures [n 3 h w] side by side, [h (n w) 3]."""
    return np.concatenate(images.transpose(0, 2, 3, 1), axis=1)


def chunk_plot(example: Example) -> np.ndarray:
    """One small axis per action dimension, recorded and predicted; a uint8 picture [h w 3]."""
    from matplotlib.figure import Figure
    from PIL import Image

    dims = example.recorded.shape[1]
    figure = Figure(figsize=(2.2 * dims, 2), layout="tight")
    for i, axis in enumerate(figure.subplots(1, dims, squeeze=False)[0]):
        axis.plot(example.recorded[:, i], color="black", label="recorded")
        axis.plot(example.predicted[:, i], color="tab:orange", label="predicted")
        axis.set_title(f"action {i}", fontsize=8)
        axis.tick_params(labelsize=6)
    figure.axes[0].legend(fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return np.asarray(Image.open(buffer).convert("RGB"))
