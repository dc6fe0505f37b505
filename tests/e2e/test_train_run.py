"""scripts/run.py as people call it: help, mistakes, one process, two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
RUN = [sys.executable, str(REPOSITORY / "scripts" / "run.py")]
QUICK = [
    "--config-name=train_toy",
    "steps=4",
    "batch_size=8",
    "validate.every=2",
    "validate.frames=16",
    "validate.batch_size=8",
    "checkpoint.every=2",
    "log_every=1",
]


def call(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


def losses(folder: Path) -> dict[tuple[str, int], float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {(row["kind"], row["step"]): row["loss"] for row in found}


def test_help_is_quick_and_lists_the_configs(tmp_path: Path) -> None:
    started = os.times()
    done = call([*RUN, "--help"], tmp_path)
    spent = os.times()
    assert done.returncode == 0
    assert "train_demo" in done.stdout
    assert "--config-name" in done.stdout
    # Processor time, which does not depend on what else the machine is doing.
    children = spent.children_user - started.children_user
    assert children + spent.children_system - started.children_system < 2
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_import_torch() -> None:
    code = "import sys; import pizero.agent.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-name=train_tyo"], "did you mean 'train_toy'?"),
        (["-cn", "train_tyo"], "did you mean 'train_toy'?"),
        (
            ["--config-name=train_toy", "stepps=3"],
            "config has no key 'stepps'; did you mean 'steps'?",
        ),
        (["--config-name=train_toy", "model=tooy"], "in the group 'model'; did you mean 'toy'?"),
        (["--config-name=train_toy", "+stepps=3"], "no key 'stepps'; did you mean 'steps'?"),
        (["--config-name=train_toy", "data.path=nowhere"], "nowhere"),
        ([], "error: --config-name=NAME is needed"),
    ],
)
def test_mistakes_end_in_a_few_lines(tmp_path: Path, words: list[str], message: str) -> None:
    done = call([*RUN, *words], tmp_path)
    assert done.returncode not in (0, None)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= (1 if words else 40)


def test_two_ranks_give_the_run_of_one(toy_data: Path, tmp_path: Path) -> None:
    data = f"data.path={toy_data}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    two = [*torchrun, "--nproc-per-node=2", RUN[1]]
    for name, command in (("one", RUN), ("two", two), ("split", two)):
        options = ["micro_batch_size=2"] if name == "split" else []
        done = call([*command, *QUICK, data, f"run_dir={name}", *options], tmp_path)
        assert done.returncode == 0, done.stderr
    one = losses(tmp_path / "one")
    assert len(one) == 6
    for name in ("two", "split"):
        assert losses(tmp_path / name) == pytest.approx(one, rel=1e-5)
    # One run folder each, and nothing else: no folder per rank, none by Hydra.
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two", "split"}
    assert len((tmp_path / "two" / "run.log").read_text().splitlines()) == len(
        (tmp_path / "one" / "run.log").read_text().splitlines()
    )


def test_sigterm_saves_and_the_same_command_goes_on(toy_data: Path, tmp_path: Path) -> None:
    # A reading process hears the signal too, as under a scheduler, and must not end by it.
    words = [*RUN, *QUICK, f"data.path={toy_data}", "run_dir=run", "steps=4000", "data.workers=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*words, "validate.every=4000", "checkpoint.every=4000"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "by SIGTERM; the same command goes on" in said
    last = max(step for _, step in losses(tmp_path / "run"))
    folders = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert folders == [f"step_{last:08d}"]


def test_wandb_needs_no_account(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing, offline: metrics, and what the policy saw with its chunk beside."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    words = [*QUICK, f"data.path={toy_data}", "run_dir=run", "tracker=wandb"]
    done = call([*RUN, *words], tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert next(folder.glob("*.wandb")).stat().st_size > 1000
    pictures = {p.name.split("_")[0] for p in (folder / "files/media/images/val").glob("*.png")}
    assert pictures == {"seen", "chunks"}
