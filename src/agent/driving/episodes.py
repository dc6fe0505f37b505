"""Which episodes an evaluation runs, and the file that remembers those already run.

`episodes.jsonl` begins with the protocol: everything that decides what a success rate means. Every
further line is one finished episode. A killed evaluation reads the file and runs the rest; if the
protocol has changed in the meantime it refuses, because rates of two protocols cannot be added up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Episode:
    """One rollout to be made: a start of a task, under an arm of the evaluation.

    `text` None means the scene's own sentence; `named_task` is the task whose words are spoken
    when they are another task's.
    """

    arm: str
    weights: str
    task: str
    start: int
    text: str | None = None
    named_task: str | None = None

    @property
    def key(self) -> str:
        return f"{self.arm}/{self.task}/{self.start}"


@dataclass(frozen=True)
class EpisodeResult:
    """What happened in one episode.

    `success` and `named_success` hold both rules: "any" (at some step) and "end" (at the last).
    `first_success` counts control steps from 1.
    """

    arm: str
    task: str
    start: int
    text: str
    steps: int
    decisions: int
    success: dict[str, bool]
    first_success: int | None
    goals: dict[str, dict[str, bool]]
    named_task: str | None
    named_success: dict[str, bool] | None
    seconds: float

    @property
    def key(self) -> str:
        return f"{self.arm}/{self.task}/{self.start}"


def fingerprint(protocol: Mapping[str, Any]) -> str:
    """Sixteen hex digits that change when anything in the protocol changes."""
    canonical = json.dumps(protocol, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class EpisodeLog:
    """The episodes of one protocol, on disk.

    Opening an existing file keeps its finished episodes; a torn last line (the process died while
    writing) is dropped. A file of another protocol is a ValueError that shows what differs.
    """

    def __init__(self, path: Path, *, protocol: Mapping[str, Any]) -> None:
        self.path = path
        self.protocol = json.loads(json.dumps(protocol))
        self.fingerprint = fingerprint(protocol)
        self.results: dict[str, EpisodeResult] = {}
        if path.exists() and self._read():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"fingerprint": self.fingerprint, "protocol": self.protocol}
        write_atomically(path, json.dumps(header) + "\n")

    def append(self, result: EpisodeResult) -> None:
        """Records a finished episode; it survives a crash right after this call."""
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[result.key] = result

    def _read(self) -> bool:
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        lines = whole.splitlines()
        if not lines:
            return False
        header = json.loads(lines[0])
        if header["fingerprint"] != self.fingerprint:
            if len(lines) == 1:
                return False  # begun, but not one episode: nothing to mix
            raise ValueError(self._refusal(header))
        for line in lines[1:]:
            result = EpisodeResult(**json.loads(line))
            self.results[result.key] = result
        if whole != text:
            write_atomically(self.path, whole)
        return True

    def _refusal(self, header: Mapping[str, Any]) -> str:
        there, here = _flat(header["protocol"]), _flat(self.protocol)
        changed = [
            f"  {key}: {there.get(key, 'absent')} there, {here.get(key, 'absent')} here"
            for key in sorted(there.keys() | here.keys())
            if there.get(key, "absent") != here.get(key, "absent")
        ]
        return "\n".join(
            [
                f"{self.path} holds episodes of protocol {header['fingerprint']}, "
                f"this evaluation is {self.fingerprint}; their rates must not be mixed:",
                *changed,
                "use another run_dir, or delete that folder to start over",
            ]
        )


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys, so that a difference can be named."""
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}
