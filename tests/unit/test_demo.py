"""The demonstration's driver: order, resuming, and what it measures; phases are small scripts."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pizero.agent import demo
from pizero.agent.config import load_config
from pizero.agent.demo import DemoConfig, DemoWorkspace, PhaseConfig

RATE = {"rate": 0.5, "low": 0.2, "high": 0.8, "successes": 5, "trials": 10}
SCORES = {"success": RATE, "any": RATE, "end": RATE, "mean_steps_to_success": 7.0}
RESULTS = {
    "name": "tiny",
    "fingerprint": "0" * 16,
    "headline_arm": "trained",
    "rule": "any",
    "arms": {
        "trained": {**SCORES, "weights": "checkpoint", "swap": None, "tasks": {"push": SCORES}},
        "untrained": {**SCORES, "weights": "random", "swap": None, "tasks": {"push": SCORES}},
        "swapped": {
            **SCORES,
            "named": RATE | {"rate": 0.4},
            "weights": "checkpoint",
            "swap": {"push": "pull"},
            "tasks": {"push": {**SCORES, "named": RATE}},
        },
    },
    "protocol": {
        "simulator": "line",
        "simulator_version": "1",
        "pool": "eval",
        "arms": {"trained": {"starts": 10, "tasks": ["push"], "weights": "checkpoint"}},
        "act_steps": 2,
        "max_steps": 12,
        "steps_after_success": 0,
        "seed": 0,
    },
    "checkpoint": {"step": 7},
    "timing": {"decisions": 0},
    "hardware": {},
    "versions": {},
}


def workspace(folder: Path, **overrides: list[str]) -> DemoWorkspace:
    def phase(name: str, config: str, *fixed: str) -> PhaseConfig:
        return PhaseConfig(
            config=config,
            overrides=[*fixed, *overrides.get(name, [])],
            folder=str(folder / name),
            processes=1,
        )

    phases = {
        "collect": phase("collect", "collect_demo"),
        "train": phase("train", "train_demo"),
        "evaluate": phase("evaluate", "eval_demo", "checkpoint=somewhere"),
    }
    return DemoWorkspace(
        DemoConfig(
            _target_="pizero.agent.demo.DemoWorkspace",
            title="tiny demo",
            run_dir=str(folder),
            phases=phases,
            training=str(folder / "train"),
            evaluation=str(folder / "evaluate"),
        )
    )


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The phases that were started, each a script that leaves its results in the phase's folder."""
    started: list[str] = []

    def command(phase: PhaseConfig) -> list[str]:
        folder = Path(phase.folder)
        started.append(folder.name)
        script = (
            "import pathlib, sys; f = pathlib.Path(sys.argv[1]); f.mkdir(exist_ok=True); "
            "(f / 'results.json').write_text(sys.argv[2]); sys.exit((f / 'fail').exists())"
        )
        return [sys.executable, "-c", script, str(folder), json.dumps(RESULTS)]

    monkeypatch.setattr(demo, "command", command)
    return started


def test_metrics_and_report_at_the_end(tmp_path, ran):
    workspace(tmp_path).run()
    assert ran == ["collect", "train", "evaluate"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["success_rate"] == 0.5
    assert metrics["success_interval"] == [0.2, 0.8]
    assert metrics["tasks"]["push"]["episodes"] == 10
    assert metrics["success_rate_untrained"] == 0.5
    assert metrics["success_rate_swapped_instruction"] == 0.5
    assert metrics["success_rate_swapped_instruction_named_goal"] == 0.4
    assert list(metrics["seconds"]) == ["collect", "train", "evaluate", "report"]
    assert metrics["total_seconds"] == pytest.approx(sum(metrics["seconds"].values()), abs=0.2)
    assert list(metrics["peak_rss_mb_by_phase"]) == ["collect", "train", "evaluate"]
    assert min(metrics["peak_rss_mb_by_phase"].values()) > 1
    assert metrics["peak_rss_mb"] == max(metrics["peak_rss_mb_by_phase"].values())
    assert "tiny demo" in (tmp_path / "report.html").read_text()


def test_finished_phases_are_not_repeated(tmp_path, ran):
    workspace(tmp_path).run()
    ran.clear()
    workspace(tmp_path).run()
    assert ran == []


def test_a_changed_phase_starts_afresh_with_all_that_follow(tmp_path, ran):
    workspace(tmp_path).run()
    ran.clear()
    (tmp_path / "collect" / "kept").touch()
    (tmp_path / "train" / "stale").touch()
    workspace(tmp_path, train=["steps=3"]).run()
    assert ran == ["train", "evaluate"]
    assert (tmp_path / "collect" / "kept").exists()
    assert not (tmp_path / "train" / "stale").exists()


def test_a_failed_phase_is_named_and_goes_on_later(tmp_path, ran):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "fail").touch()
    with pytest.raises(ValueError, match="phase 'train' ended with status 1"):
        workspace(tmp_path).run()
    assert ran == ["collect", "train"]
    (tmp_path / "train" / "fail").unlink()
    ran.clear()
    workspace(tmp_path).run()
    assert ran == ["train", "evaluate"]


def test_a_folder_outside_is_never_touched(tmp_path):
    config = workspace(tmp_path).config
    config.phases["train"].folder = str(tmp_path.parent)
    with pytest.raises(ValueError, match=r"phases.train.folder must lie in run_dir"):
        DemoWorkspace(config)


def test_a_stopped_process_is_told_and_not_taken_for_done():
    # Leaves with status 0 when asked to, as training does after saving.
    script = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
        "time.sleep(30)"
    )
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    status, was_stopped, _ = demo.run_process([sys.executable, "-c", script])
    assert was_stopped
    assert status in (0, -signal.SIGTERM)  # the latter if it had no time to install its handler
    assert time.monotonic() - started < 20


def test_commands_are_those_a_person_would_type():
    config = load_config("demo", ["run_dir=outputs/x"])
    collect, train, evaluate = (demo.command(p) for p in config.phases.values())
    assert collect[1:3] == [str(demo.entry_point()), "--config-name=collect_demo"]
    assert "checkpoint=outputs/x/train" in evaluate
    assert "run_dir=outputs/x/train" in train
    config.phases["train"].processes = 2
    command = demo.command(config.phases["train"])
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for phase in config.phases.values():
        assert load_config(phase.config, phase.overrides)
