"""The parent's end of a simulator: start a worker process, call it, notice when it dies.

    with EnvClient.launch(simulator="metaworld", options={"image_size": 64}) as env:
        observation = env.call("reset", task="push", start=0, pool="eval")
        result = env.call("run", actions=np.zeros((4, 4), np.float32))

For several workers at once: `submit` to each, `select` on the clients (they have a `fileno`), then
`result` of those that are ready.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pizero.agent.env import protocol

_START_SECONDS = 60.0


class WorkerDied(RuntimeError):
    """The simulator process is gone; the message says how and ends with what it last printed."""


class EnvClient:
    """One simulator in a process of its own, one request at a time. Made by `launch`."""

    def __init__(
        self,
        *,
        simulator: str,
        connection: socket.socket,
        process: subprocess.Popen[bytes],
        log: IO[bytes],
    ) -> None:
        self.simulator = simulator
        self._connection = connection
        self._process = process
        self._log = log
        self._started = False
        self._method: str | None = None

    @classmethod
    def launch(
        cls, *, simulator: str, options: Mapping[str, Any] | None = None, python: str | None = None
    ) -> EnvClient:
        """Start a worker. `python` is its interpreter (None: this one); `options` are the arguments
        of the simulator's class.

        Returns before the simulator is built, so that several can start at the same time; what
        goes wrong there is raised by the first call.
        """
        # A socket in a folder that only this user can enter: nobody else can connect.
        folder = tempfile.mkdtemp(prefix="pizero-env-")
        log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the client
        path = os.path.join(folder, "socket")
        command = [python or sys.executable, str(Path(__file__).with_name("worker.py"))]
        command += ["--connect", path, "--simulator", simulator]
        command += ["--options", json.dumps(dict(options or {}))]
        process = None
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(path)
                listener.listen(1)
                try:
                    # A session of its own: Ctrl-C is for the parent, which then closes its workers.
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                except OSError as error:
                    raise ValueError(
                        f"cannot start the interpreter {command[0]!r}: {error}"
                    ) from error
                connection = _accept(listener, process, log)
        except BaseException:
            _stop(process)
            log.close()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return cls(simulator=simulator, connection=connection, process=process, log=log)

    @property
    def pid(self) -> int:
        """The worker's process number."""
        return self._process.pid

    def call(self, method: str, **arguments: Any) -> Any:
        """Run a method of the simulator and wait for what it returns."""
        self.submit(method, **arguments)
        return self.result()

    def submit(self, method: str, **arguments: Any) -> None:
        """Begin a method of the simulator; `result` fetches what it returns."""
        if self._method is not None:
            raise RuntimeError(f"{self._method!r} is still running: fetch its result first")
        try:
            if not self._started:
                self._answer("start", timeout=None)
                self._started = True
            protocol.send(self._connection, {"method": method, "arguments": arguments})
        except (EOFError, OSError) as error:
            raise self._died(method) from error
        self._method = method

    def result(self, timeout: float | None = None) -> Any:
        """What the submitted method returned. TimeoutError after `timeout` s; then ask again."""
        if self._method is None:
            raise RuntimeError("nothing is running: submit first")
        method = self._method
        try:
            answer = self._answer(method, timeout)
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            self._method = None
            raise self._died(method) from error
        except (RuntimeError, ValueError):
            self._method = None
            raise
        self._method = None
        return answer

    def fileno(self) -> int:
        """The socket's number, for `select`: readable when a result is there."""
        return self._connection.fileno()

    def close(self) -> None:
        """End the worker. Harmless when it has ended already."""
        self._connection.close()
        _stop(self._process)
        self._log.close()

    def __enter__(self) -> EnvClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self, method: str, timeout: float | None) -> Any:
        if not select.select([self._connection], [], [], timeout)[0]:
            raise TimeoutError(f"{self.simulator}: no answer to {method!r} within {timeout} s")
        reply = protocol.receive(self._connection)
        if "error" in reply:
            error = reply["error"]
            if error["user"]:
                raise ValueError(error["message"])
            raise RuntimeError(
                f"{self.simulator} failed in {method!r}: {error['message']}\n{error['traceback']}"
            )
        return reply["result"]

    def _died(self, method: str) -> WorkerDied:
        try:
            status = f"exit status {self._process.wait(timeout=2.0)}"
        except subprocess.TimeoutExpired:
            status = "still running, but its connection is closed"
        except ValueError:
            status = "closed"
        return WorkerDied(
            f"the {self.simulator} worker died in {method!r} ({status})\n{_tail(self._log)}"
        )


def _accept(
    listener: socket.socket, process: subprocess.Popen[bytes], log: IO[bytes]
) -> socket.socket:
    listener.settimeout(0.2)
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if process.poll() is not None:
                status = f"exit status {process.returncode}"
                raise WorkerDied(
                    f"the worker ended before it connected ({status})\n{_tail(log)}"
                ) from None
            if time.monotonic() > deadline:
                raise WorkerDied(
                    f"the worker did not connect within {_START_SECONDS:.0f} s\n{_tail(log)}"
                ) from None
            continue
        connection.setblocking(True)
        return connection


def _stop(process: subprocess.Popen[bytes] | None) -> None:
    """A worker whose connection is closed ends by itself, unless it is deep in a simulation."""
    if process is None:
        return
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: IO[bytes], size: int = 2000) -> str:
    if log.closed:
        return ""
    # pread: the worker writes through the same file position, which must not move.
    length = os.fstat(log.fileno()).st_size
    data = os.pread(log.fileno(), size, max(0, length - size))
    return data.decode(errors="replace").strip()
