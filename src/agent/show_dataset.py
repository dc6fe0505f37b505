"""`scripts/show_dataset.py`: one page about a data set, or about all that a configuration mixes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pizero.agent.report.dataset import EPISODES, write_dataset_report
from pizero.agent.report.dataset_look import LIMIT, REACH
from pizero.agent.sources import add_arguments, open_sources


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page; a mistake ends in one message."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console(highlight=False)
    try:
        path = _run(options, console)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    console.print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)


def _run(options: argparse.Namespace, console: Console) -> Path:
    for name in ("episodes", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"expected --{name} >= 1, got {value}")
    sources = open_sources(options, lenient=True)
    for problem in sources.parts[0].problems:
        console.print(f"warning: {problem}", style="yellow", soft_wrap=True, markup=False)
    for what, (keys, found) in sources.parts[0].keys.items():
        if found == "guessed":
            console.print(f"{what}: {_words(keys)} (guessed)", soft_wrap=True)
    with console.status("reading") as status:
        return write_dataset_report(
            options.output or Path("outputs/datasets") / f"{sources.title}.html",
            sources,
            episodes=options.episodes,
            limit=options.limit,
            first=options.normalization,
            progress=lambda name: status.update(f"reading {name}"),
        )


def _words(keys: object) -> str:
    if isinstance(keys, dict):
        return ", ".join(f"{name}={key}" for name, key in keys.items())
    return " ".join(keys) if isinstance(keys, list) else str(keys)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="show_dataset.py", description="Write one offline page about a data set."
    )
    add_arguments(parser)
    add = parser.add_argument
    add("--output", type=Path, help="file to write (default: outputs/datasets/<name>.html)")
    add("--episodes", type=int, help=f"shown of each data set (default: {EPISODES} in all)")
    add("--limit", type=int, default=LIMIT, help=f"steps looked at (default: {LIMIT:,})")
    add(
        "--normalization",
        choices=sorted(REACH),
        default="quantile",
        help="shown first, unless a robot or a configuration says how",
    )
    return parser
