"""Check the invariants of speed that need no GPU: `python -m bench`, the same as `make bench`."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from bench import report
from bench.invariants import GROUPS, Check
from bench.workloads import WORKLOADS, Workload

# A, B and D are one policy in different sizes: one of them shows what no size can change.
STRUCTURE = ("calls", "waits", "memory", "graphs")
TYPICAL = ("B", "C")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--out", type=Path, default=report.RESULTS / "invariants.json")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    checks: list[Check] = []
    seconds: dict[str, float] = {}
    for group in options.only:
        began = time.perf_counter()
        checks += GROUPS[group](_workloads(group, options.workloads))
        seconds[group] = time.perf_counter() - began
    failed = [c for c in checks if not c.ok]
    report.show(
        "invariants of speed",
        ("check", "", "measured", "expected", "note"),
        [
            (f"{c.group}: {c.name}", "ok" if c.ok else "FAILED", c.measured, c.expected, c.why)
            for c in checks
        ],
    )
    took = ", ".join(f"{group} {s:.0f} s" for group, s in seconds.items())
    print(
        f"{len(checks) - len(failed)} of {len(checks)} hold; "
        f"{time.perf_counter() - started:.0f} s ({took})"
    )
    content = {"versions": report.versions(), "checks": [asdict(c) for c in checks]}
    report.write_json(options.out, content)
    return 1 if failed else 0


def _workloads(group: str, names: list[str]) -> list[Workload]:
    wanted = [n for n in names if n in TYPICAL] if group in STRUCTURE else names
    return [WORKLOADS[n] for n in wanted]


if __name__ == "__main__":
    raise SystemExit(main())
