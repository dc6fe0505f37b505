"""The batch scripts against a stand-in for Slurm: what they start, and what a warning leads to."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Every command of Slurm notes how it was called; srun also waits for `go` when the test says so.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >>"$CALLS"
case $(basename "$0") in
    scontrol) [ "$1" = show ] && printf 'node7\\nnode8\\n' ;;
    srun) if [ -n "${WAIT_FOR:-}" ]; then until [ -e "$WAIT_FOR" ]; do sleep 0.02; done; fi ;;
    scancel) touch "$WAIT_FOR" ;;
esac
exit 0
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a batch job, and the file in which its calls of Slurm are noted."""
    for name in ("srun", "scontrol", "scancel"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    return calls, os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_ARRAY_TASK_ID": "2",
    }


@pytest.mark.parametrize("script", ["train_node.sh", "train_nodes.sh"])
def test_training_meets_on_the_first_node(slurm, script):
    calls, env = slurm
    command = ["bash", f"slurm/{script}", "--config-name=train_toy", "steps=3"]
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=20)
    show, srun = calls.read_text().splitlines()
    assert show == "scontrol show hostnames node[7-8]"
    assert "--nnodes=2" in srun
    assert "--rdzv-id=123" in srun
    assert "--rdzv-endpoint=node7:20123" in srun
    assert srun.endswith("scripts/run.py --config-name=train_toy steps=3")


def test_a_warning_reaches_the_trainers_and_queues_the_job_again(slurm, tmp_path):
    calls, env = slurm
    env["WAIT_FOR"] = str(tmp_path / "go")
    job = subprocess.Popen(["bash", "slurm/train_node.sh"], cwd=ROOT, env=env)
    deadline = time.monotonic() + 20
    while not (calls.exists() and "srun" in calls.read_text()):
        assert time.monotonic() < deadline, "srun was never called"
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 0
    assert calls.read_text().splitlines()[2:] == [
        "scancel --signal=USR1 123",
        "scontrol requeue 123",
    ]


def test_array_task_takes_its_line(slurm, tmp_path):
    calls, env = slurm
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# comment\nname=a seed=1\n\nname=b seed=2 act_steps=4\n")
    command = ["bash", "slurm/eval_array.sh", str(sweep), "--config-name=eval_demo"]
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=20, capture_output=True)
    assert calls.read_text().strip() == (
        "srun .venv/bin/python scripts/run.py --config-name=eval_demo name=b seed=2 act_steps=4"
    )
    env["SLURM_ARRAY_TASK_ID"] = "3"
    failed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=20)
    assert failed.returncode == 1
    assert "no line 3" in failed.stderr


def test_a_set_is_resized_in_parts(slurm):
    calls, env = slurm
    command = ["bash", "slurm/resize_rlds.sh", "data/bridge", "data/small", "--size", "224"]
    program = "srun .venv/bin/python scripts/resize_rlds.py data/bridge data/small --size 224"
    env |= {"SLURM_CPUS_PER_TASK": "16", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=20, capture_output=True)
    assert calls.read_text().strip() == f"{program} --workers 16 --part 1/8"
    calls.unlink()
    alone = {key: value for key, value in env.items() if not key.startswith("SLURM_ARRAY")}
    subprocess.run(command, cwd=ROOT, env=alone, check=True, timeout=20, capture_output=True)
    assert calls.read_text().strip() == f"{program} --workers 16 --part 0/1"
