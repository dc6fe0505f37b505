"""What a number was measured on: machine and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "numpy", "hydra-core", "metaworld", "mujoco", "simpler_env", "av", "pizero")


def hardware() -> dict[str, str | int | float]:
    """Processor, cores that this process may use, memory and GPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    described: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "memory_gb": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }
    gpu = _gpu()
    return described | ({"gpu": gpu} if gpu else {})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = git_commit()
    return found | ({"git commit": commit} if commit else {})


def git_commit() -> str | None:
    """The commit of the source tree, marked "+changes" if files differ; None for other installs."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
        changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    try:
        return _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).replace(
            "\n", ", "
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()
