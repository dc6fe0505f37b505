"""A collection from configuration to a dataset that is read back, stopped and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pizero.agent.collect import CollectWorkspace
from pizero.agent.config import load_config
from pizero.data.dataset import RldsDataset

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
OVERRIDES = [
    "env.simulator=stand_in.demo_world:DemoWorld",
    "~env.options",
    "episodes_per_task=6",
    "val_episodes_per_task=2",
    "noise.default=[0.0,0.5]",
    "+noise.lift=[0.25]",
    "hold=1",
    "workers=2",
    "image_encoding=png",
]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def overrides(folder, **options):
    given = ", ".join(f"{key}: {value}" for key, value in options.items())
    return [*OVERRIDES, f"output={folder}", f"+env.options={{{given}}}"]


def workspace(folder, *changes, **options):
    return CollectWorkspace(load_config("collect_demo", [*overrides(folder, **options), *changes]))


def dataset(folder, split):
    return RldsDataset(
        path=folder / "metaworld_demo" / "1.0.0",
        split=split,
        cameras={"front": "observation/front"},
        state="observation/state",
        action="action",
        text="language_instruction",
        horizon=2,
    )


def files(folder):
    found = folder.rglob("*.tfrecord-*")
    return {path.name: path.read_bytes() for path in found}


def test_what_is_collected(tmp_path):
    result = workspace(tmp_path, fail_at=3).run()
    assert result["tasks"] == {
        "lift": {"train": 4, "val": 2, "failed": 0},
        "drop": {"train": 3, "val": 2, "failed": 1},
    }
    train, val = dataset(tmp_path, "train"), dataset(tmp_path, "val")
    assert (train.num_episodes, val.num_episodes) == (7, 4)
    starts = [set(np.unique(part.metadata("start"))) for part in (train, val)]
    assert starts == [{2, 3, 4, 5}, {0, 1}]
    sample = train.read(0)
    start, task = train.metadata("start")[0], train.metadata("task")[0]
    assert sample["text"] == f"{task} it"
    np.testing.assert_array_equal(sample["images"]["front"], np.full((8, 8, 3), 20 * start))
    # Levels rotate over starts, and every second round of them begins displaced.
    seen = {
        (str(task), int(start), float(noise), bool(displaced))
        for part in (train, val)
        for task, start, noise, displaced in zip(
            *(part.metadata(key) for key in ("task", "start", "noise", "displaced")), strict=True
        )
    }
    lift = {("lift", start, 0.25, start % 2 == 1) for start in range(6)}
    drop = {("drop", i, (0.0, 0.5)[i % 2], i // 2 % 2 == 1) for i in range(6) if i != 3}
    assert seen == lift | drop


def test_the_result_does_not_depend_on_workers_and_their_deaths(tmp_path):
    mark = tmp_path / "die"
    mark.write_text("4")
    workspace(tmp_path / "a", "workers=1").run()
    workspace(tmp_path / "b", die_once=mark).run()
    assert not mark.exists()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 2


def test_a_start_that_always_kills_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"start=2.*has killed its worker 2 times"):
        workspace(tmp_path, die_at=2).run()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_continued(tmp_path, how):
    command = [sys.executable, str(REPOSITORY / "scripts" / "run.py"), "--config-name=collect_demo"]
    arguments = overrides(tmp_path, seconds=0.2, fail_at=0)
    log = tmp_path / "metaworld_demo" / "1.0.0" / ".parts" / "episodes.jsonl"
    with subprocess.Popen(
        [*command, *arguments], stderr=subprocess.PIPE, text=True, preexec_fn=_hear_interrupts
    ) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(how)
        _, said = process.communicate(timeout=20)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "the same command continues" in said
    before = [json.loads(line)["key"] for line in log.read_text().splitlines()]
    assert 3 <= len(before) < 11
    workspace(tmp_path, seconds=0.2, fail_at=0).run()
    workspace(tmp_path / "whole", fail_at=0).run()
    assert files(tmp_path / "metaworld_demo") == files(tmp_path / "whole")


def test_a_finished_collection_stays_and_other_settings_are_refused(tmp_path):
    first = workspace(tmp_path).run()
    assert workspace(tmp_path, "workers=1").run() == json.loads(json.dumps(first))
    with pytest.raises(ValueError, match=r"begun with other settings .hold: 1 -> 3."):
        workspace(tmp_path, "hold=3").run()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"between 0 and episodes_per_task, got 6 of 6"):
        workspace(tmp_path, "val_episodes_per_task=6")
    with pytest.raises(ValueError, match=r"for 'default' and for every task"):
        workspace(tmp_path, "~noise.default")
    with pytest.raises(ValueError, match=r"noise names \['lyft'\], but the tasks are"):
        workspace(tmp_path, "+noise.lyft=[0.1]").run()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is a Linux notion")
def test_no_number_of_workers_means_one_for_each_core(tmp_path):
    assert workspace(tmp_path, "workers=null")._workers() == len(os.sched_getaffinity(0))


def _hear_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and so would their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
