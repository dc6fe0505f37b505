"""Compare ours with another implementation's numbers: python scripts/check_parity.py CASE_DIR ...

A case is a folder with weights, inputs and expected outputs (docs/parity.md says how to write one),
or with transforms alone. Exits 0 only if every tensor of every case is within its tolerance.
"""

import argparse
import sys

from rich.console import Console

from pizero.agent.parity import check_case, show
from pizero.agent.parity.report import words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="+", metavar="CASE_DIR")
    parser.add_argument("--failing", action="store_true", help="list only the tensors that fail")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    passed = []
    for folder in arguments.cases:
        try:
            report = check_case(folder)
        except Exception as error:  # of this case; the others have their turn
            failure = f"FAILS: {folder}: {words(error)}"
            console.print(failure, style="bold red", markup=False, soft_wrap=True)
            passed.append(False)
            continue
        show(report, console, failing_only=arguments.failing)
        passed.append(report.ok)
    if len(passed) > 1:
        console.print(f"{sum(passed)} of {len(passed)} cases pass")
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
