"""The demonstration: collect, train, evaluate and report, each an ordinary run of its own config.

    make demo        or        python scripts/run.py --config-name=demo

Every phase is a process that could as well be started by hand; this workspace only starts them in
order, times them, and remembers in `phases.json` which have finished under which configuration. So
an interrupted demo goes on where it stopped, a finished phase is not repeated, and a phase whose
configuration has changed starts afresh together with all that follow it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pizero.agent.config import config_dir, load_config, to_yaml
from pizero.agent.driving.episodes import write_atomically
from pizero.agent.machine import hardware, versions
from pizero.agent.report import write_report

MAX_CPU_PROCESSES = 2


@dataclass
class PhaseConfig:
    """One step of the demonstration."""

    config: str  # a primary config
    overrides: list[str]
    folder: str  # what the phase writes; removed when its configuration has changed
    processes: int | None  # under torchrun; null: one per GPU, or per CPU core up to two


@dataclass
class DemoConfig:
    """Root of config/demo*.yaml."""

    _target_: str
    title: str
    run_dir: str
    phases: dict[str, PhaseConfig]  # in order
    training: str  # folders that the report shows
    evaluation: str


class DemoWorkspace:
    """Runs the phases that are not done yet, then writes metrics.json and report.html."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.folder = Path(config.run_dir)
        for name, phase in config.phases.items():
            if not Path(phase.folder).resolve().is_relative_to(self.folder.resolve()):
                raise ValueError(
                    f"phases.{name}.folder must lie in run_dir {self.folder}, got {phase.folder}"
                )
        self.console = Console()

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = Record(self.folder / "phases.json")
        chain = ""
        for number, (name, phase) in enumerate(self.config.phases.items(), start=1):
            settings = to_yaml(load_config(phase.config, phase.overrides))
            chain = hashlib.sha256((chain + settings).encode()).hexdigest()[:16]
            heading = f"[bold]{number}/{len(self.config.phases)} {name}[/]"
            if record.is_done(name, chain):
                self.console.print(f"{heading}: done already ({record.seconds(name):.0f} s)")
                continue
            if record.was_begun_otherwise(name, chain):
                self.console.print(f"{heading}: its configuration has changed, starting afresh")
                shutil.rmtree(phase.folder, ignore_errors=True)
            self.console.print(heading)
            self._run_phase(name, command(phase), record, chain)
        self._write_up(record)

    def _run_phase(
        self, name: str, arguments: Sequence[str], record: Record, fingerprint: str
    ) -> None:
        started = time.perf_counter()
        status, was_stopped, peak_memory_mb = run_process(arguments)
        record.add(
            name,
            fingerprint=fingerprint,
            seconds=time.perf_counter() - started,
            peak_memory_mb=peak_memory_mb,
            is_done=status == 0 and not was_stopped,
        )
        if was_stopped:
            self.console.print(f"{name} stopped; the same command continues")
            sys.exit(130)
        if status != 0:
            raise ValueError(
                f"phase {name!r} ended with status {status}; what it said is above. The same "
                "command continues from there"
            )

    def _write_up(self, record: Record) -> None:
        started = time.perf_counter()
        evaluation = Path(self.config.evaluation)
        results = json.loads((evaluation / "results.json").read_text())
        phases = [record.describe(name) for name in self.config.phases]
        report = write_report(
            self.folder / "report.html",
            evaluation=evaluation,
            training=Path(self.config.training),
            phases=phases,
            title=self.config.title,
        )
        phases.append({"name": "report", "seconds": round(time.perf_counter() - started, 1)})
        metrics = demo_metrics(results, phases)
        write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        self.console.print(summary_table(results, metrics))
        self.console.print(f"report   {report}\nmetrics  {self.folder / 'metrics.json'}")


class Record:
    """phases.json: seconds, memory and fingerprint of each phase, over all sittings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.phases: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.phases = json.loads(path.read_text())

    def is_done(self, name: str, fingerprint: str) -> bool:
        phase = self.phases.get(name, {})
        return phase.get("fingerprint") == fingerprint and phase["is_done"]

    def was_begun_otherwise(self, name: str, fingerprint: str) -> bool:
        return name in self.phases and self.phases[name]["fingerprint"] != fingerprint

    def seconds(self, name: str) -> float:
        return self.phases[name]["seconds"]

    def add(
        self,
        name: str,
        *,
        fingerprint: str,
        seconds: float,
        peak_memory_mb: float,
        is_done: bool,
    ) -> None:
        """Counts a sitting; earlier ones count too if they had the same configuration."""
        earlier = self.phases.get(name, {})
        if earlier.get("fingerprint") == fingerprint:
            seconds += earlier["seconds"]
            peak_memory_mb = max(peak_memory_mb, earlier["peak_memory_mb"])
        self.phases[name] = {
            "fingerprint": fingerprint,
            "seconds": round(seconds, 1),
            "peak_memory_mb": round(peak_memory_mb, 1),
            "is_done": is_done,
        }
        write_atomically(self.path, json.dumps(self.phases, indent=2) + "\n")

    def describe(self, name: str) -> dict[str, Any]:
        return {"name": name} | {k: self.phases[name][k] for k in ("seconds", "peak_memory_mb")}


def command(phase: PhaseConfig) -> list[str]:
    """The command line of a phase, as a person would type it."""
    processes = automatic_processes() if phase.processes is None else phase.processes
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*start, str(entry_point()), f"--config-name={phase.config}", *phase.overrides]


def automatic_processes() -> int:
    """One per GPU; without one, one per CPU core up to two, which suits a small model best."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return torch.cuda.device_count() or min(cores or 1, MAX_CPU_PROCESSES)


def entry_point() -> Path:
    """scripts/run.py of a checkout, or the installed command beside the interpreter."""
    script = config_dir().parent / "scripts" / "run.py"
    return script if script.is_file() else Path(sys.executable).with_name("pizero-run")


def run_process(arguments: Sequence[str]) -> tuple[int, bool, float]:
    """Runs a command to its end: its exit status, whether we were asked to stop, its peak memory.

    An interrupt or SIGTERM is passed on as SIGTERM, on which training saves before it leaves; a
    second one kills. Memory is that of the largest single process below, in MB.
    """
    # A group of its own, so that Ctrl-C reaches it once, through us.
    process = subprocess.Popen(arguments, start_new_session=True)
    asked = 0

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGKILL)

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes.
    return process.returncode, asked > 0, usage.ru_maxrss * unit / 1e6


def demo_metrics(results: Mapping[str, Any], phases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """metrics.json: the headline, what it is compared with, and what it cost."""
    arms, main = results["arms"], results["arms"][results["headline_arm"]]
    metrics: dict[str, Any] = {
        "success_rate": main["success"]["rate"],
        "success_interval": interval(main["success"]),
        "success_rule": results["rule"],
        "episodes": main["success"]["trials"],
        "tasks": {
            task: {
                "success_rate": scores["success"]["rate"],
                "success_interval": interval(scores["success"]),
                "successes": scores["success"]["successes"],
                "episodes": scores["success"]["trials"],
            }
            for task, scores in main["tasks"].items()
        },
    }
    for arm in arms.values():
        if arm["weights"] == "random":
            metrics["success_rate_untrained"] = arm["success"]["rate"]
            metrics["success_interval_untrained"] = interval(arm["success"])
        if "named" in arm:
            metrics |= swapped_metrics(arm, main)
    memory = [phase["peak_memory_mb"] for phase in phases if "peak_memory_mb" in phase]
    return metrics | {
        "seconds": {phase["name"]: phase["seconds"] for phase in phases},
        "total_seconds": round(sum(phase["seconds"] for phase in phases), 1),
        "peak_rss_mb": max(memory),  # of the largest process
        "peak_rss_mb_by_phase": {
            phase["name"]: phase["peak_memory_mb"] for phase in phases if "peak_memory_mb" in phase
        },
        "protocol": results["fingerprint"],
        "checkpoint": results["checkpoint"],
        "hardware": hardware(),
        "versions": versions(),
    }


def swapped_metrics(arm: Mapping[str, Any], main: Mapping[str, Any]) -> dict[str, Any]:
    """Told another task's sentence: how often the scene's own goal is reached (which a policy that
    listens leaves alone), and how often the goal that the words name.

    Beside them the same scenes told their own sentence.
    """
    own = [main["tasks"][task]["success"] for task in arm["tasks"] if task in main["tasks"]]
    right = sum(s["successes"] for s in own) / sum(s["trials"] for s in own) if own else None
    return {
        "swapped_instruction_tasks": list(arm["tasks"]),
        "swapped_instruction_episodes": arm["success"]["trials"],
        "success_rate_right_instruction": right,
        "success_rate_swapped_instruction": arm["success"]["rate"],
        "success_interval_swapped_instruction": interval(arm["success"]),
        "success_rate_swapped_instruction_named_goal": arm["named"]["rate"],
        "success_interval_swapped_instruction_named_goal": interval(arm["named"]),
    }


def interval(score: Mapping[str, float]) -> list[float]:
    """The ends of a rate's 95 % interval."""
    return [round(score["low"], 4), round(score["high"], 4)]


def summary_table(results: Mapping[str, Any], metrics: Mapping[str, Any]) -> Table:
    """What the demonstration ends with on the screen."""
    minutes = metrics["total_seconds"] / 60
    table = Table(title=f"success on unseen starts ({minutes:.1f} min in all)")
    table.add_column("task")
    table.add_column("success", justify="right")
    table.add_column("95 % interval", justify="right")

    def add(name: str, score: Mapping[str, Any], style: str | None = None) -> None:
        share = f"{score['rate']:.0%} ({score['successes']}/{score['trials']})"
        table.add_row(name, share, f"{score['low']:.0%} to {score['high']:.0%}", style=style)

    main = results["headline_arm"]
    for task, scores in results["arms"][main]["tasks"].items():
        add(task, scores["success"])
    table.add_section()
    add("all tasks", results["arms"][main]["success"], "bold")
    for name, arm in results["arms"].items():
        if name == main:
            continue
        if "named" in arm:
            add(f"{name}: the scene's goal", arm["success"])
            add(f"{name}: the goal the words name", arm["named"])
        else:
            add(name, arm["success"])
    return table
