"""Rewrite an RLDS set with smaller pictures: python scripts/resize_rlds.py SOURCE TARGET --size 224

Resizes and re-encodes every picture of at least 64 pixels, in all splits, and can put channels
right and leave out failed episodes on the way; the rest stays as it is, byte for byte. A job that
was stopped goes on when the same command is given again. docs/images.md says more.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from pizero.data.files import read_json
from pizero.data.rlds.index import find_dataset
from pizero.data.rlds.rewrite import KNOWN_FIXES, Changes, rewrite, success_key, wrist_keys
from pizero.data.rlds.spec import DatasetSpec


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite and say what came of it; a mistake ends in one message."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    console = Console(highlight=False)
    try:
        outcome = rewrite(
            options.source,
            options.target,
            changes=_changes(options, console),
            num_workers=options.workers,
            part=options.part,
            on_error=options.on_error,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for line in outcome.damaged:
        console.print(f"left out: {line}", markup=False, soft_wrap=True)
    counts = f"{outcome.episodes} episodes written"
    counts += f", {outcome.dropped} failed ones dropped" if outcome.dropped else ""
    counts += f", {len(outcome.damaged)} damages" if outcome.damaged else ""
    state = "complete" if outcome.is_complete else "shards of other parts are missing"
    console.print(f"{outcome.folder}: {counts}; {state}", markup=False, soft_wrap=True)


def _changes(options: argparse.Namespace, console: Console) -> Changes:
    directory = find_dataset(options.source)
    spec = DatasetSpec.load(directory / "features.json")
    flip = list(options.flip_channels)
    if options.flip_wrist_channels:
        flip += wrist_keys(spec)
    success = options.filter_success
    changes = Changes(
        size=options.size,
        quality=options.quality,
        subsampling=options.subsampling,
        flip=tuple(flip),
        success=success_key(spec) if success == "" else success,
    )
    name = read_json(directory / "dataset_info.json").get("name")
    fixes = KNOWN_FIXES.get(name, {})
    if options.known_fixes:
        return replace(changes, **fixes)
    wanted = ", ".join(f"{k} {fix}" for k, fix in sorted(fixes.items()) if not getattr(changes, k))
    if wanted:
        note = f"note: {name} is known to need {wanted}; --known-fixes does it"
        console.print(note, markup=False, soft_wrap=True)
    return changes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", help="folder that holds one RLDS set")
    parser.add_argument("target", help="the result goes to TARGET/<name>/<version>")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="PIXELS",
        help="a side, or height x width, e.g. 224 or 180x320",
    )
    parser.add_argument("--quality", type=int, default=95, help="of JPEG; %(default)s")
    parser.add_argument(
        "--subsampling", choices=("420", "444"), default="420", help="of colours; %(default)s"
    )
    parser.add_argument(
        "--flip-channels", nargs="+", default=(), metavar="KEY", help="swap red and blue of these"
    )
    parser.add_argument(
        "--flip-wrist-channels", action="store_true", help="of wrist_image and hand_image"
    )
    parser.add_argument(
        "--filter-success",
        nargs="?",
        const="",
        metavar="KEY",
        help="keep episodes whose KEY is true; without KEY: success",
    )
    parser.add_argument(
        "--known-fixes", action="store_true", help="channels and filter that the set is known for"
    )
    parser.add_argument("--workers", type=int, help="processes; one per CPU")
    parser.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="only every N-th shard, from I"
    )
    parser.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise", help="at damaged records"
    )
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    return int(first), int(count)


if __name__ == "__main__":
    main()
