"""Make a LeRobot set's videos quick to read at random: python scripts/reencode_videos.py DATASET

python scripts/reencode_videos.py lerobot/aloha_sim_insertion_human --gop 2 --codec av1 --workers 4

Each file is encoded anew under a temporary name and replaced when its frames were counted; files
that are so already are left alone, so a run that was stopped continues. docs/lerobot.md says more.
"""

import argparse
import logging
import sys
from pathlib import Path

from pizero.data.lerobot.encode import CRF, ENCODERS, GOP
from pizero.data.lerobot.files import find_set
from pizero.data.lerobot.reencode import reencode_set


def main(arguments: list[str] | None = None) -> None:
    """Encode, and say what was done; files that could not be are listed, with exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser().parse_args(arguments)
    try:
        count, problems = reencode_set(
            find_set(options.dataset),
            codec=options.codec,
            crf=options.crf,
            gop=options.gop,
            num_workers=options.workers,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{count} videos were encoded anew")
    if problems:
        sys.exit("\n".join([f"error: {len(problems)} videos stay as they are:", *problems]))


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    description = "Encode the videos of a LeRobot set anew, with key frames close together."
    parser = argparse.ArgumentParser(prog="reencode_videos.py", description=description)
    add = parser.add_argument
    add("dataset", type=Path, help="a folder, or the Hub's name of a set on this machine")
    add("--gop", type=int, default=GOP, help="frames from one key frame to the next (default: 2)")
    add("--codec", choices=sorted(ENCODERS), help="(default: each file's own)")
    usual = ", ".join(f"{codec} {crf}" for codec, crf in CRF.items())
    add("--crf", type=int, help=f"quality, smaller is better (default: {usual})")
    add("--workers", type=int, default=0, help="processes (default: none but this one)")
    return parser


if __name__ == "__main__":
    main()
