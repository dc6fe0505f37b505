"""RLDS sets of the real specifications with made-up content, for tests, benchmarks and trials.

`write_synthetic` takes the features of a published dataset and fills every key of them. What there
is to see and to learn is one scene: coloured blocks on a table, and a hand that goes to the block
the sentence names, grasps it and lifts it. Where the hand and the blocks are is in the pictures,
how the hand moves follows from that, and states are the sum of the actions, in the conventions of
the dataset. Sets without conventions of their own here are filled by type: floating values are a
fixed mixture of the hand's pose, or of its command where the key names an action.

The conventions of `bridge_dataset`: the first action rests, the gripper counts 1 as open and takes
a command at half a range a step, one episode in ten has no sentence, and the cameras but the first
are missing from some episodes (empty images). Of `fractal20220817_data`: the gripper's action says
only when to begin to close (1) or open (-1), and the pose has a quaternion, x y z w.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pizero.data.index import unknown_key
from pizero.data.rlds.spec import STEPS, DatasetSpec, FeatureSpec
from pizero.data.rlds.writer import RldsWriter

SPECS = Path(__file__).parent / "specs"
COLOURS = {
    "red": (225, 50, 45),
    "green": (60, 190, 75),
    "blue": (60, 90, 225),
    "yellow": (240, 205, 60),
}
SENTENCES = ("pick up the {} block", "take the {} block", "lift the {} block off the table")
QUALITY = 95  # and half the resolution of colours: what tfds writes
HAND, GRIPPER = slice(0, 6), 6
VIEWS = ("front", "left", "right", "wrist")
REST = 0.08  # of a step: how far commands stray


@dataclass(frozen=True)
class Play:
    """One episode as it went. Lengths are those of the scene, a table from -1 to 1.

    hand      [T 7]: x, y, height, roll, pitch, yaw, and how far the gripper is closed, 0 to 1
    move      [T 6]: what the command adds to the pose
    close     [T]: the gripper's command, 0 open and 1 closed
    places    [blocks 3]: x, y and yaw of each block; the first is the wanted one
    """

    number: int
    text: str
    colours: tuple[str, ...]
    hand: np.ndarray
    move: np.ndarray
    close: np.ndarray
    places: np.ndarray
    generator: np.random.Generator

    def __len__(self) -> int:
        return len(self.hand)

    @property
    def is_success(self) -> bool:
        """The block is off the table at the end."""
        return bool(self.hand[-1, GRIPPER] == 1 and self.hand[-1, 2] > 0)


def write_synthetic(
    folder: str | Path,
    spec: str | Path = "bridge_dataset",
    *,
    episodes: Mapping[str, int],
    image_size: tuple[int, int] | None = None,
    steps: tuple[int, int] = (20, 60),
    shards: int = 1,
    seed: int = 0,
    unlabeled: float | None = None,
    short_episodes: int = 0,
) -> Path:
    """Write a set with the features of `spec` and return its folder, <folder>/<name>/<version>.

    spec            a name of `specs()`, or the path of a features.json
    episodes        how many, for each split
    image_size      (height, width) of the pictures; None: as in the spec
    steps           fewest and most of an episode
    shards          files of each split
    unlabeled       share of episodes without a sentence; None: as is usual for the spec
    short_episodes  so many episodes of each split have one step or two, by turns

    Equal arguments give equal files. A killed run goes on where it was.
    """
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"expected steps (fewest, most) of at least 1, got {steps}")
    name, version, tree = _load(spec)
    if image_size is not None:
        tree = _resized(tree, image_size)
    features = DatasetSpec.from_json(tree)
    conventions, usual = _CONVENTIONS.get(name, (None, 0.0))
    unlabeled = usual if unlabeled is None else unlabeled
    writer = RldsWriter(
        folder,
        name=name,
        version=version,
        features=_flat(features),
        splits=tuple(episodes),
        shards=shards,
    )
    with writer:
        for number_of_split, (split, count) in enumerate(episodes.items()):
            for number in range(count):
                key = f"{split} {number:06d}"
                if key in writer or writer.is_finished:
                    continue
                generator = np.random.default_rng([seed, number_of_split, number])
                length = 1 + number % 2 if number < short_episodes else None
                play = _play(number, steps, length, unlabeled, generator)
                values = conventions(features, play) if conventions else {}
                values = _complete(features, play, values)
                rest = {k: v for k, v in values.items() if not k.startswith(STEPS)}
                inner = {k.removeprefix(STEPS): values[k] for k in values if k not in rest}
                writer.add_episode(split, inner, rest, key=key)
        path = writer.finish()
    _write_json(path / "features.json", tree)  # as published; the writer knows fewer classes
    return path


def specs() -> list[str]:
    """Names of the specifications at hand."""
    return sorted(path.stem.rpartition("-")[0] for path in SPECS.glob("*.json"))


def load_features(name: str) -> dict[str, Any]:
    """The features.json of one of `specs()`."""
    return _load(name)[2]


def _load(spec: str | Path) -> tuple[str, str, dict[str, Any]]:
    """Name, version and features of a specification."""
    if Path(spec).name == "features.json":
        path = Path(spec).expanduser()
        if not path.is_file():
            raise ValueError(f"no features.json at {path}")
        info = path.with_name("dataset_info.json")
        facts = json.loads(info.read_text()) if info.exists() else {}
        name = facts.get("name", path.parent.name)
        return name, facts.get("version", "1.0.0"), json.loads(path.read_text())
    found = sorted(SPECS.glob(f"{spec}-*.json"))
    if not found:
        raise unknown_key(str(spec), specs(), where="the list of specifications")
    name, _, version = found[-1].stem.rpartition("-")
    return name, version, json.loads(found[-1].read_text())


def _resized(node: Any, size: tuple[int, int]) -> Any:
    """The tree with all pictures of another height and width."""
    if not isinstance(node, dict):
        return node
    if "image" in node and "pythonClassName" in node:  # not a feature that is called image
        dimensions = node["image"].get("shape", {}).get("dimensions", ["", "", "3"])
        shape = {"dimensions": [str(size[0]), str(size[1]), dimensions[-1]]}
        return node | {"image": node["image"] | {"shape": shape}}
    return {key: _resized(child, size) for key, child in node.items()}


def _play(
    number: int,
    steps: tuple[int, int],
    length: int | None,
    unlabeled: float,
    generator: np.random.Generator,
) -> Play:
    """Let the hand do what the sentence says; `length` None draws one within `steps`."""
    colours = tuple(generator.permutation(list(COLOURS))[: generator.integers(2, 4)].tolist())
    places = np.empty((0, 3))
    while len(places) < len(colours):  # blocks do not overlap
        place = generator.uniform([-0.8, -0.8, -0.7], [0.8, 0.8, 0.7])
        if not len(places) or np.hypot(*(places - place)[:, :2].T).min() > 0.5:
            places = np.concatenate([places, place[None]])
    if length is None:
        length = int(generator.integers(steps[0], steps[1], endpoint=True))
    text = SENTENCES[generator.integers(len(SENTENCES))].format(colours[0])
    text = "" if generator.random() < unlabeled else text

    # The pace belongs to the set, not to the episode: what to do follows from what can be seen.
    down = 2 / max(steps[1] // 6, 2)
    pace = 3 / max(steps[1], 4)
    far = pace * max(length - 2 / down - 4, 1)
    hand = np.zeros((length, 7))
    command, moves = np.zeros(length), np.zeros((length, 6))
    place = _start(places[0, :2], far, generator)
    pose = np.array([*place, generator.uniform(0.7, 1), 0, 0, generator.uniform(-0.7, 0.7)])
    closed = close = 0.0
    for t in range(length):
        hand[t, HAND], hand[t, GRIPPER] = pose, closed
        way = places[0, :2] - pose[:2]
        distance = float(np.hypot(*way))
        if distance < 0.02 and pose[2] < 0.05:
            close = 1.0
        move = np.zeros(6)
        move[:2] = way * min(1, pace / max(distance, 1e-9))
        if closed == 1:
            move[2] = min(down, 1 - pose[2])
        elif distance < 0.1 and not close:
            move[2] = -min(down, pose[2])
        turns = np.array([0.3 * pose[1], -0.3 * pose[0], places[0, 2]]) - pose[3:]
        move[3:] = np.clip(turns, -pace / 2, pace / 2)
        move += REST * pace * generator.normal(size=6) * (distance > 0.1)
        if t == 0:
            move[:] = 0
        moves[t], command[t] = move, close
        pose = pose + move
        closed += float(np.clip(close - closed, -0.5, 0.5))
    return Play(number, text, colours, hand, moves, command, places, generator)


def _start(goal: np.ndarray, distance: float, generator: np.random.Generator) -> np.ndarray:
    """A point on the table that is as far from the goal, or as near to that as the table allows."""
    angles = generator.uniform(0, 2 * np.pi, 16)
    ends = goal + distance * np.stack([np.cos(angles), np.sin(angles)], 1)
    inside = np.clip(ends, -0.95, 0.95)
    return inside[np.argmin(np.abs(np.hypot(*(inside - goal).T) - distance))]


# What a set calls it ------------------------------------------------------------------------------

Values = dict[str, Any]  # flat keys as in features.json, `steps/` included


def _bridge(features: DatasetSpec, play: Play) -> Values:
    scale = np.array([0.1, 0.15, 0.12, 1, 1, 1])
    pose = play.hand[:, HAND] * scale + [0.3, 0, 0.03, 0, 0, 0]
    views = dict(zip(range(4), VIEWS, strict=True))
    seen = {i: i == 0 or play.generator.random() < (0.1 if i == 3 else 0.6) for i in views}
    pictures = {
        f"steps/observation/image_{i}": _pictures(features.steps[f"observation/image_{i}"], play, v)
        if seen[i]
        else [b""] * len(play)
        for i, v in views.items()
    }
    return pictures | {
        "steps/observation/state": np.concatenate([pose, 1 - play.hand[:, GRIPPER:]], axis=1),
        "steps/action": np.concatenate([play.move * scale, 1 - play.close[:, None]], axis=1),
        "steps/reward": _at_the_end(play),
        "steps/discount": 1.0,
        **{f"episode_metadata/has_image_{i}": seen[i] for i in views},
        "episode_metadata/has_language": bool(play.text),
        "episode_metadata/file_path": f"synthetic/{'_'.join(play.text.split())}/out.npy",
    }


def _fractal(features: DatasetSpec, play: Play) -> Values:
    scale, origin = np.array([0.15, 0.25, 0.2, 1, 1, 1]), np.array([0.55, 0.05, 0.7, 0, 0, 0])
    pose = play.hand[:, HAND] * scale + origin
    wanted = np.array([*play.places[0, :2], 0, 0, 0, play.places[0, 2]]) * scale + origin
    mode = np.tile(np.array([0, 1, 0], np.int32), (len(play), 1))
    mode[-1] = (1, 0, 0)
    observation = {
        "base_pose_tool_reached": np.concatenate([pose[:, :3], _quaternions(pose[:, 3:])], axis=1),
        "gripper_closed": play.hand[:, GRIPPER:],
        "gripper_closedness_commanded": play.close[:, None],
        "height_to_bottom": pose[:, 2:3],
        "vector_to_go": (wanted - pose)[:, :3],
        "rotation_delta_to_go": (wanted - pose)[:, 3:],
    }
    action = {
        "world_vector": play.move[:, :3] * scale[:3],
        "rotation_delta": play.move[:, 3:],
        "gripper_closedness_action": np.diff(play.close, prepend=0)[:, None],
        "terminate_episode": mode,
        "base_displacement_vector": np.zeros((len(play), 2)),
        "base_displacement_vertical_rotation": np.zeros((len(play), 1)),
    }
    return {
        **{f"steps/observation/{k}": v for k, v in observation.items()},
        **{f"steps/action/{k}": v for k, v in action.items()},
        "steps/reward": _at_the_end(play),
        "aspects/has_aspects": True,
        "aspects/feasible": True,
        "aspects/success": play.is_success,
        "attributes/task_family_name": play.text.split(" ")[0],
        "attributes/objects_family_name": "block",
    }


# What fills the keys that have to be so, and the usual share of episodes without a sentence.
_CONVENTIONS: dict[str, tuple[Callable[[DatasetSpec, Play], Values], float]] = {
    "bridge_dataset": (_bridge, 0.1),
    "fractal20220817_data": (_fractal, 0.0),
}


def _complete(features: DatasetSpec, play: Play, values: Values) -> Values:
    """The values, and one by name and type for every key that has none."""
    steps = np.arange(len(play))
    marks = {"is_first": steps == 0, "is_last": steps == steps[-1], "is_terminal": steps < 0}
    values = {STEPS + k: v for k, v in marks.items() if k in features.steps} | values
    pictures = [STEPS + k for k, s in features.steps.items() if s.kind == "image"]
    for key, spec in _flat(features).items():
        if key in pictures and key not in values:
            view = VIEWS[pictures.index(key) % len(VIEWS)]
            values[key] = _pictures(spec, play, view)
        elif key not in values:
            values[key] = _value(key, spec, play)
    return values


def _value(key: str, spec: FeatureSpec, play: Play) -> Any:
    if spec.kind == "text" and not spec.codes:
        is_sentence = "instruction" in key or "language" in key
        return play.text if is_sentence else ""
    if spec.kind != "tensor" or -1 in spec.shape or spec.dtype in ("string", "object"):
        raise ValueError(f"{key}: expected pictures, text or arrays of fixed shape, got {spec}")
    shape = (len(play), *spec.shape) if key.startswith(STEPS) else spec.shape
    if "embedding" in key:
        source = np.tile(_mixture(play.text, (1, spec.size))[0], (len(play), 1))
    elif spec.dtype.startswith("float") and key.startswith(STEPS):
        pose = np.concatenate([play.move, play.close[:, None]], 1) if "action" in key else play.hand
        source = pose @ _mixture(key, (pose.shape[1], spec.size))
    else:
        source = np.broadcast_to(play.number % 100 if spec.dtype != "bool" else 0, shape)
    return source.reshape(shape).astype(spec.dtype)


def _mixture(name: str, shape: tuple[int, int]) -> np.ndarray:
    """Numbers that depend on the name alone, of norm 1 in each row."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    return numbers / np.linalg.norm(numbers, axis=1, keepdims=True)


def _at_the_end(play: Play) -> np.ndarray:
    return (np.arange(len(play)) == len(play) - 1) * float(play.is_success)


def _quaternions(angles: np.ndarray) -> np.ndarray:
    """x, y, z, w of roll, pitch and yaw about fixed axes, in this order: [n 4] from [n 3]."""
    cosines, sines = np.cos(angles / 2).T, np.sin(angles / 2).T
    (cr, cp, cy), (sr, sp, sy) = cosines, sines
    return np.stack(
        [
            sr * cp * cy - cr * sp * sy,
            cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy,
            cr * cp * cy + sr * sp * sy,
        ],
        axis=1,
    )


# Pictures -----------------------------------------------------------------------------------------

_MODES = {("uint8", 3): "RGB", ("uint8", 1): "L", ("uint16", 1): "I;16"}
# How far the table's x and y reach to the right and down in a picture.
_AXES = {
    "front": ((1, 0), (0, 1)),
    "left": ((0, 1), (-1, 0)),
    "right": ((0, -1), (1, 0)),
    "wrist": ((1, 0), (0, 1)),
}


def _pictures(spec: FeatureSpec, play: Play, view: str) -> list[bytes]:
    """What a camera saw, encoded: the scene on a table with a grain, and the camera's noise."""
    mode = _MODES.get((spec.dtype, spec.shape[-1]))
    if mode is None:
        raise ValueError(f"expected pictures of {sorted(_MODES)}, got {spec}")
    height, width = (d if d > 0 else 256 for d in spec.shape[:2])
    table = _table(height, width, play.generator)
    noise = play.generator.normal(0, 2, (height + 32, width + 32, 1)).astype(np.int16)
    encoded = []
    for step in range(len(play)):
        image = table.copy()
        _draw(image, play, step, view)
        row, column = play.generator.integers(0, 32, 2)
        pixels = np.asarray(image) + noise[row : row + height, column : column + width]
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
        stream = io.BytesIO()
        image.save(stream, "PNG" if spec.encoding == "png" else "JPEG", quality=QUALITY)
        encoded.append(stream.getvalue())
    return encoded


def _table(height: int, width: int, generator: np.random.Generator) -> Image.Image:
    """A surface with spots of all sizes."""
    surface = np.zeros((height, width, 3))
    for cells, contrast in ((4, 18), (16, 12), (64, 9), (128, 6)):
        shape = (min(cells, height), min(cells, width))
        spots = generator.normal(128, contrast, (*shape, 1)) + generator.normal(0, 3, (*shape, 3))
        image = Image.fromarray(spots.clip(0, 255).astype(np.uint8))
        surface += np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), float) - 128
    tone = generator.uniform(90, 150) + generator.uniform(-10, 10, 3)
    return Image.fromarray((surface + tone).clip(0, 255).astype(np.uint8))


def _draw(image: Image.Image, play: Play, step: int, view: str) -> None:
    size, canvas = np.array(image.size), ImageDraw.Draw(image)
    hand = play.hand[step]
    centre, zoom = (hand[:2], 2.0) if view == "wrist" else (np.zeros(2), 0.85)

    def to_pixels(points: np.ndarray, lift: float = 0.0) -> list[tuple[float, float]]:
        """Where points [n 2] of the table are seen; what is lifted moves up."""
        seen = (points - centre) @ np.array(_AXES[view]) * zoom - [0, 0.25 * lift]
        return [(x, y) for x, y in ((seen + 1) / 2 * size).tolist()]

    for place, colour in reversed(list(zip(play.places, play.colours, strict=True))):
        is_held = hand[GRIPPER] == 1 and colour == play.colours[0]
        middle, lift = (hand[:2], hand[2]) if is_held else (place[:2], 0.0)
        corners = _rectangle(middle, place[2], 0.24, 0.24)
        if is_held:
            canvas.polygon(to_pixels(corners), fill=(50, 45, 45))
        canvas.polygon(to_pixels(corners, lift), fill=COLOURS[colour])
    grip = 0.24 - 0.1 * hand[GRIPPER]
    for side in (-grip, grip):
        offset = side * np.array([np.cos(hand[5]), np.sin(hand[5])])
        finger = _rectangle(hand[:2] + offset, hand[5], 0.09, 0.3)
        canvas.polygon(to_pixels(finger), fill=(50, 45, 45))
        canvas.polygon(to_pixels(finger, hand[2]), fill=(235, 235, 230))


def _rectangle(middle: np.ndarray, angle: float, width: float, height: float) -> np.ndarray:
    """Corners [4 2]."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2]
    cosine, sine = np.cos(angle), np.sin(angle)
    return middle + corners @ np.array([[cosine, sine], [-sine, cosine]])


def _flat(features: DatasetSpec) -> dict[str, FeatureSpec]:
    return {STEPS + k: s for k, s in features.steps.items()} | dict(features.episode)


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)
