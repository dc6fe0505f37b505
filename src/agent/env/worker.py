"""The process in which a simulator lives: `python worker.py --connect SOCKET --simulator NAME`.

It runs under any interpreter that has numpy, msgpack and the simulator, because simulators and
torch often cannot share one environment. pizero need not be installed there: the package is
registered from this file's own place. The worker connects to the unix socket that its parent made,
answers one request at a time, and ends when the parent does.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import select
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

SIMULATORS = {"metaworld": "pizero.agent.env.metaworld:MetaworldSimulator"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve a simulator to the process that began this one."
    )
    parser.add_argument("--connect", required=True, help="path of the parent's unix socket")
    parser.add_argument("--simulator", required=True, help=f"{sorted(SIMULATORS)} or module:Class")
    parser.add_argument("--options", default="{}", help="JSON: arguments of the simulator's class")
    arguments = parser.parse_args()
    parent = os.getppid()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(arguments.connect)
    with connection:
        _register_package()
        serve(connection, arguments.simulator, json.loads(arguments.options), parent)


def serve(connection: socket.socket, simulator: str, options: dict[str, Any], parent: int) -> None:
    """Build the simulator, say so (or why not), then answer requests until the parent has gone."""
    from pizero.agent.env.base import unknown_name
    from pizero.agent.env.protocol import receive, send

    try:
        built = _load(simulator)(**options)
        methods = {
            "describe": built.describe,
            "reset": built.reset,
            "run": built.run,
            "demonstrate": built.demonstrate,
        }
    except Exception as error:
        send(connection, _failure(error))
        return
    send(connection, {"result": None})
    while _wait(connection, parent):
        try:
            request = receive(connection)
        except (EOFError, ConnectionError):
            return
        try:
            if request["method"] not in methods:
                raise unknown_name("method", request["method"], methods)
            reply = {"result": methods[request["method"]](**request["arguments"])}
        except Exception as error:
            reply = _failure(error)
        try:
            send(connection, reply)
        except ConnectionError:
            return


def _wait(connection: socket.socket, parent: int) -> bool:
    """True when a request (or the end) is there to be read, False when the parent has died.

    The end of the connection alone would not do: a forked child of the parent, such as a data
    loading process, keeps a copy of the socket open.
    """
    while True:
        if select.select([connection], [], [], 1.0)[0]:
            return True
        if os.getppid() != parent:
            return False


def _failure(error: Exception) -> dict[str, Any]:
    return {
        "error": {
            "user": isinstance(error, ValueError),
            "message": f"{error}"
            if isinstance(error, ValueError)
            else f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    }


def _load(simulator: str) -> Any:
    from pizero.agent.env.base import unknown_name

    if ":" not in simulator and simulator not in SIMULATORS:
        raise unknown_name("simulator", simulator, [*SIMULATORS, "module:Class"])
    module, _, name = SIMULATORS.get(simulator, simulator).partition(":")
    return getattr(importlib.import_module(module), name)


def _register_package() -> None:
    """Make `pizero` importable from this checkout, whether or not it is installed here.

    Python puts a script's folder first on the path, where metaworld.py would hide the simulator of
    that name: it is taken away.
    """
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != here]
    root = here.parent.parent
    spec = importlib.util.spec_from_file_location(
        "pizero", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pizero"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
