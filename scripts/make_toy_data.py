"""Write a tiny RLDS set: python scripts/make_toy_data.py [outputs/toy/data].

A dot chases the red or the green square, as the sentence says. It has the layout of collected
demonstrations and is small enough to train on within seconds.

With --spec it has the features of a published set instead, and a hand grasps the block that the
sentence names: python scripts/make_toy_data.py outputs/toy --spec bridge_dataset --size 64
"""

import argparse
from pathlib import Path

import numpy as np

from pizero.data.rlds.spec import FeatureSpec
from pizero.data.rlds.synthetic import specs, write_synthetic
from pizero.data.rlds.writer import RldsWriter

SIZE = 16
COLOURS = {"red": (255, 40, 40), "green": (40, 255, 40)}
EPISODES = {"train": 24, "val": 6}
STEPS = 8


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/toy/data"))
    known = ", ".join(specs())
    parser.add_argument("--spec", help=f"{known}, or the path of a features.json")
    published = parser.add_argument_group("with --spec")
    published.add_argument("--train", type=int, default=EPISODES["train"], help="episodes")
    published.add_argument("--val", type=int, default=EPISODES["val"], help="episodes; 0: no split")
    published.add_argument("--size", type=int, help="of pictures; without it as in the spec")
    published.add_argument("--steps", type=int, nargs=2, default=(20, 60), help="fewest and most")
    published.add_argument("--shards", type=int, default=1, help="files of each split")
    published.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.spec is None:
        print(write_toy_data(options.folder))
        return
    size = None if options.size is None else (options.size, options.size)
    episodes = {"train": options.train} | ({"val": options.val} if options.val else {})
    path = write_synthetic(
        options.folder,
        options.spec,
        episodes=episodes,
        image_size=size,
        steps=tuple(options.steps),
        shards=options.shards,
        seed=options.seed,
    )
    print(path)


def write_toy_data(folder: Path) -> Path:
    """Write both splits; returns the folder of the data set."""
    picture = FeatureSpec.image(SIZE, SIZE, encoding="png")
    features = {
        "steps/observation/corner": picture,
        "steps/observation/wrist": picture,
        "steps/observation/state": FeatureSpec.tensor([4]),
        "steps/action": FeatureSpec.tensor([4]),
        "steps/language_instruction": FeatureSpec.text(),
        "steps/is_first": FeatureSpec.scalar("bool"),
        "steps/is_last": FeatureSpec.scalar("bool"),
        "episode_metadata/task": FeatureSpec.text(),
    }
    writer = RldsWriter(folder, name="toy", features=features)
    for split, count in EPISODES.items():
        for number in range(count):
            key = f"{split}_{number:03d}"
            if key not in writer and not writer.is_finished:
                generator = np.random.default_rng([number, len(split)])
                colour = sorted(COLOURS)[number % len(COLOURS)]
                metadata = {"task": f"reach-{colour}"}
                writer.add_episode(split, episode(colour, generator), metadata, key=key)
    return writer.finish()


def episode(wanted: str, generator: np.random.Generator) -> dict[str, object]:
    """One chase, positions in [-1, 1]; `state` is the dot and its last move."""
    places = dict(zip(COLOURS, generator.uniform(-0.8, 0.8, (len(COLOURS), 2)), strict=True))
    dot, move = generator.uniform(-0.8, 0.8, 2), np.zeros(2)
    steps: dict[str, list] = {"corner": [], "wrist": [], "state": [], "action": []}
    for _ in range(STEPS):
        steps["corner"].append(draw(places, centre=np.zeros(2), dot=dot))
        steps["wrist"].append(draw(places, centre=dot, dot=dot))
        steps["state"].append(np.concatenate([dot, move]))
        move = np.clip(places[wanted] - dot, -0.3, 0.3)
        steps["action"].append(np.concatenate([move, np.abs(move)]))
        dot = dot + move
    return {
        "observation/corner": np.stack(steps["corner"]),
        "observation/wrist": np.stack(steps["wrist"]),
        "observation/state": np.stack(steps["state"]).astype(np.float32),
        "action": np.stack(steps["action"]).astype(np.float32),
        "language_instruction": f"reach the {wanted} square",
    }


def draw(places: dict[str, np.ndarray], *, centre: np.ndarray, dot: np.ndarray) -> np.ndarray:
    """The scene around `centre`, uint8 [h w 3]."""
    image = np.full((SIZE, SIZE, 3), 60, np.uint8)
    for place, colour in [*((places[c], COLOURS[c]) for c in COLOURS), (dot, (255, 255, 255))]:
        row, column = np.clip(((place - centre + 1) / 2 * SIZE).astype(int), 1, SIZE - 1)
        image[row - 1 : row + 1, column - 1 : column + 1] = colour
    return image


if __name__ == "__main__":
    main()
