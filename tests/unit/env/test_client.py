"""A worker process: answers, errors, death on either side, and foreign interpreters."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest

from pizero.agent.env.client import EnvClient, WorkerDied

TESTS = Path(__file__).parents[2]
WORLD = "stand_in.demo_world:DemoWorld"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


@pytest.fixture
def client():
    with EnvClient.launch(simulator=WORLD) as client:
        yield client


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_call_and_no_torch_in_the_worker(client):
    result = client.call("run", actions=np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(result["double"], np.full((2, 3), 2.0))
    assert not result["torch"]


def test_submit_select_result(client):
    client.submit("describe")
    with pytest.raises(RuntimeError, match="'describe' is still running"):
        client.submit("describe")
    assert select.select([client], [], [], 10)[0] == [client]
    assert client.result()["cameras"] == ["front"]
    with pytest.raises(RuntimeError, match="nothing is running"):
        client.result()


def test_a_timeout_can_be_waited_for_again():
    with EnvClient.launch(simulator=WORLD, options={"seconds": 0.4}) as client:
        arguments = {"pool": "demo", "noise": 0.0, "displace": False, "hold": 0}
        client.submit("demonstrate", task="lift", start=1, **arguments)
        with pytest.raises(TimeoutError, match="no answer to 'demonstrate'"):
            client.result(timeout=0.05)
        assert client.result()["success"]


def test_the_users_mistakes_come_back_as_value_errors(client):
    with pytest.raises(ValueError, match="start must be 0 or more, got -1"):
        client.call("reset", task="lift", start=-1)
    with pytest.raises(ValueError, match=r"unknown method 'rest' .did you mean 'reset'"):
        client.call("rest")
    with pytest.raises(RuntimeError, match=r"failed in 'run': TypeError(.|\n)*Traceback"):
        client.call("run")
    assert client.call("reset", task="lift", start=1)["text"] == "lift"


def test_a_simulator_that_cannot_be_built():
    with (
        EnvClient.launch(simulator="metawrld") as client,
        pytest.raises(ValueError, match=r"unknown simulator 'metawrld' .did you mean 'metaworld'"),
    ):
        client.call("describe")
    with (
        EnvClient.launch(simulator=WORLD, options={"speed": 1}) as client,
        pytest.raises(RuntimeError, match=r"failed in 'start': TypeError.*speed"),
    ):
        client.call("describe")


def test_a_dead_worker_is_told_with_its_last_words():
    with EnvClient.launch(simulator=WORLD, options={"die_at": 5}) as client:
        arguments = {"pool": "demo", "noise": 0.0, "displace": False, "hold": 0}
        words = r"died in 'demonstrate' \(exit status 3\)\nthe world has ended"
        with pytest.raises(WorkerDied, match=words):
            client.call("demonstrate", task="lift", start=5, **arguments)
        with pytest.raises(WorkerDied, match="died in 'describe'"):
            client.call("describe")


def test_an_interpreter_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"cannot start the interpreter '.*nothing'"):
        EnvClient.launch(simulator=WORLD, python=str(tmp_path / "nothing"))
    with pytest.raises(WorkerDied, match=r"ended before it connected .exit status 1"):
        EnvClient.launch(simulator=WORLD, python="/bin/false")


def test_another_interpreter_without_pizero(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    for package in (np, msgpack):
        folder = Path(package.__file__).parent
        for path in (folder, folder.with_name(f"{folder.name}.libs")):
            if path.exists():
                (library / path.name).symlink_to(path)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", f"{library}{os.pathsep}{TESTS}")
    alone = subprocess.run([python, "-c", "import pizero"], capture_output=True, text=True)
    assert "No module named 'pizero'" in alone.stderr
    with EnvClient.launch(simulator=WORLD, python=str(python)) as client:
        assert client.call("run", actions=np.ones(1))["double"] == [2.0]


def test_close_ends_the_worker():
    client = EnvClient.launch(simulator=WORLD)
    assert is_running(client.pid)
    client.close()
    assert not is_running(client.pid)
    client.close()


@pytest.mark.parametrize("keeps_socket", [False, True], ids=["alone", "child holds the socket"])
def test_workers_end_with_their_parent(keeps_socket):
    script = f"""
import os, time
from pizero.agent.env.client import EnvClient
client = EnvClient.launch(simulator={WORLD!r})
client.call("describe")
if {keeps_socket} and os.fork() == 0:
    time.sleep(8)
    os._exit(0)
print(client.pid, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.send_signal(signal.SIGKILL)
        assert wait_until_gone(worker, seconds=6.0)


def test_nothing_here_needs_torch():
    modules = ("base", "client", "metaworld", "metaworld_experts", "pool", "protocol", "rendering")
    imports = "; ".join(f"import pizero.agent.env.{name}" for name in modules)
    script = f"import sys; {imports}; print('torch' in sys.modules, 'mujoco' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
