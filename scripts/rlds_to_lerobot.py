"""Convert an RLDS set to LeRobot v3.0: python scripts/rlds_to_lerobot.py SRC DST --fps 10

python scripts/rlds_to_lerobot.py outputs/demo/data data/demo_lerobot --fps 10
python scripts/rlds_to_lerobot.py data/bridge_dataset data/bridge_lerobot --robot widowx \
    --camera primary=observation/image_0 --images parquet
python scripts/rlds_to_lerobot.py data/fractal20220817_data data/fractal_lerobot --oxe

All splits become one set, with their names; a LeRobot set may be the source too. With --oxe the
data are standardised as registered, and keep the values that policies learn. docs/lerobot.md says
more.
"""

import argparse
import logging
import sys
from pathlib import Path

from pizero.agent.config import build
from pizero.agent.published import robot_node
from pizero.agent.sources import dataset_splits, open_folder
from pizero.data.dataset import EpisodeDataset
from pizero.data.lerobot import export_episodes
from pizero.data.lerobot.encode import ENCODERS, GOP
from pizero.data.oxe import oxe_dataset, oxe_set
from pizero.data.oxe.registry import VIEWS
from pizero.data.rlds.index import find_dataset, splits
from pizero.data.select import parse_split


def main(arguments: list[str] | None = None) -> None:
    """Convert; a mistake ends in one message."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser().parse_args(arguments)
    try:
        datasets, fps = open_oxe(options) if options.oxe else open_plain(options)
        if fps is None:
            raise ValueError("expected --fps, the steps per second, which RLDS does not say")
        path = export_episodes(
            datasets,
            options.destination,
            fps=fps,
            images=options.images,
            codec=options.codec,
            crf=options.crf,
            gop=options.gop,
            robot_type=options.robot_type,
            overwrite=options.overwrite,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for split, data in datasets.items():
        print(f"{split}: {data.num_episodes} episodes, {len(data)} frames")
    print(f"wrote {path}")


def open_plain(options: argparse.Namespace) -> tuple[dict[str, EpisodeDataset], float | None]:
    """Each split by the keys that are given or called as usual, and the steps per second."""
    robot = None if options.robot is None else build(robot_node(options.robot), path="--robot")
    for word in options.camera:
        if not all(word.partition("=")):
            raise ValueError(f"expected --camera NAME=KEY, got {word!r}")
    cameras = dict(word.split("=", 1) for word in options.camera)
    given = {"cameras": cameras, "state": options.state, "action": options.action}
    given["text"] = options.text
    given = {what: keys for what, keys in given.items() if keys}

    def opened(split: str | None):
        return open_folder(
            options.source, split=split, given=given, robot=robot, fps=options.fps, horizon=1
        )

    first = opened(options.splits[0] if options.splits else None)
    for what, (keys, found) in first.keys.items():
        print(f"{what}: {keys} ({found})")
    names = options.splits or dataset_splits(first.dataset)
    return named({split: opened(split).dataset for split in names}), first.fps


def open_oxe(options: argparse.Namespace) -> tuple[dict[str, EpisodeDataset], float | None]:
    """Each split of a registered set, standardised, and the steps per second."""
    directory = find_dataset(options.source)
    name = directory.parent.name if directory.name[:1].isdigit() else directory.name
    # Where there is no val, a part of train is held out as val.
    names = options.splits or list(dict.fromkeys([*splits(directory), "val"]))
    datasets: dict[str, EpisodeDataset] = {
        split: oxe_dataset(name=name, path=directory, split=split, horizon=1, cameras=VIEWS)
        for split in names
    }
    return named(datasets), oxe_set(name).control_hz if options.fps is None else options.fps


def named(datasets: dict[str, EpisodeDataset]) -> dict[str, EpisodeDataset]:
    """Splits without their ranges: train[:10] is written as train."""
    names = [parse_split(split)[0] for split in datasets]
    if len(set(names)) < len(names):
        raise ValueError(f"expected one range of each split, got {', '.join(datasets)}")
    return dict(zip(names, datasets.values(), strict=True))


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    description = "Write the episodes of a data set as a LeRobot set of version 3.0."
    parser = argparse.ArgumentParser(prog="rlds_to_lerobot.py", description=description)
    add = parser.add_argument
    add("source", type=Path, help="folder of an RLDS set")
    add("destination", type=Path, help="folder to write")
    add("--fps", type=float, help="steps per second (default: the robot's, or the registered)")
    add("--splits", nargs="+", metavar="NAME", help="as in train[:10] (default: all)")
    add("--camera", nargs="+", default=[], metavar="NAME=KEY", help="(default: all pictures)")
    add("--state", nargs="+", metavar="KEY", help="keys that make the state (default: as usual)")
    add("--action", nargs="+", metavar="KEY", help="keys that make the action")
    add("--text", metavar="KEY", help="key of the instruction")
    add("--robot", help="name in config/robot, or a YAML file: names of cameras, and the rate")
    add("--oxe", action="store_true", help="standardise as registered for Open X-Embodiment")
    add("--robot-type", help="what meta/info.json says of the robot")
    add("--images", choices=("video", "parquet"), default="video", help="(default: video)")
    add("--codec", choices=sorted(ENCODERS), help="of videos (default: av1)")
    add("--crf", type=int, help="quality of videos, smaller is better (default: 30 for av1)")
    add("--gop", type=int, default=GOP, help="frames from one key frame to the next (default: 2)")
    add("--overwrite", action="store_true", help="replace what is at the destination")
    return parser


if __name__ == "__main__":
    main()
