"""Jobs are done, whoever dies meanwhile."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from pizero.agent.env.client import EnvClient
from pizero.agent.env.pool import WorkerPool

WORLD = "stand_in.demo_world:DemoWorld"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def launcher(**options):
    return partial(EnvClient.launch, simulator=WORLD, options=options)


def request(start):
    fixed = {"task": "lift", "pool": "demo", "noise": 0.0, "displace": False, "hold": 0}
    return "demonstrate", fixed | {"start": start}


def test_every_job_once():
    with WorkerPool(launcher()) as pool:
        assert pool.call("describe")["cameras"] == ["front"]
        done = sorted(job for job, _ in pool.map(range(7), request=request, workers=2))
    assert done == list(range(7))


def test_a_dead_worker_is_replaced_and_its_job_done_again(tmp_path):
    mark = tmp_path / "die"
    mark.write_text("2")
    with WorkerPool(launcher(die_once=str(mark))) as pool:
        done = sorted(job for job, _ in pool.map(range(4), request=request, workers=2))
    assert done == list(range(4))
    assert not mark.exists()


def test_a_job_that_always_kills_ends_the_work():
    with (
        WorkerPool(launcher(die_at=1)) as pool,
        pytest.raises(RuntimeError, match=r"1 has killed its worker 2 times(.|\n)*world has ended"),
    ):
        list(pool.map(range(3), request=request, workers=1))


def test_a_mistake_ends_the_work():
    with WorkerPool(launcher()) as pool, pytest.raises(ValueError, match="unknown method 'walk'"):
        list(pool.map([0], request=lambda start: ("walk", {}), workers=1))
