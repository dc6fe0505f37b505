"""Killed at any moment and started again, a run ends exactly as one that was left alone.

PIZERO_KILLS=20 python -m pytest tests/e2e/test_kill_resume.py -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

KILLS = int(os.environ.get("PIZERO_KILLS", "3"))
STEPS = 30
WEIGHTS = (
    "model.safetensors",
    "training/weights.safetensors",
    "training/optimizer.safetensors",
    "training/optimizer.json",
)


def test_a_killed_run_ends_in_the_same_weights(tmp_path: Path, toy_data: Path) -> None:
    left_alone, killed = tmp_path / "left_alone", tmp_path / "killed"
    options = [
        "--config-name=train_toy",
        f"data.path={toy_data}",
        f"steps={STEPS}",
        "checkpoint.every=2",
        "log_every=3",
        "validate.every=10",
        "validate.frames=16",
        "threads=1",
    ]
    counts = drive(0, left_alone, options)
    assert counts["killed"] == 0
    counts = drive(KILLS, killed, options)
    print(f"\n{KILLS} kills asked for: {counts}")
    assert counts["killed"] >= min(KILLS, 2)
    assert counts["while writing a checkpoint"] >= 1

    for name in WEIGHTS:
        a, b = ((run / "checkpoints" / "latest" / name) for run in (left_alone, killed))
        assert a.read_bytes() == b.read_bytes(), f"{name} differs"
    assert losses(killed) == losses(left_alone)
    assert sorted(losses(killed)["train"]) == list(range(1, STEPS + 1))
    assert not list((killed / "checkpoints").glob(".*"))


def drive(kills: int, folder: Path, options: list[str]) -> dict[str, int]:
    command = [sys.executable, str(Path(__file__).with_name("kill_driver.py"))]
    arguments = [str(kills), "7", str(folder), *options, f"run_dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def losses(run: Path) -> dict[str, dict[int, float]]:
    """kind -> step -> loss; a step that is there twice fails."""
    found: dict[str, dict[int, float]] = {"train": {}, "val": {}}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["step"] not in found[row["kind"]], f"step {row['step']} is there twice"
        found[row["kind"]][row["step"]] = row["loss"]
    return found
