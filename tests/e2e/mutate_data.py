"""Damages data sets at random, reads all of each, and tells whether the damage went unnoticed.

    python tests/e2e/mutate_data.py --count 1000 [--seed 0] [--only bridge ...]
    python tests/e2e/mutate_data.py --show 123 [--seed 0]      one of them, with its traceback

A mutation changes one file of a small data set: bits, bytes, blocks, its length, or values, names
and structure of JSON. The set is then opened and every sample read in a process of its own, which
must end in one of these ways:

    clear     ValueError or OSError of ours that names the file or the data set
    skipped   on_error: skip; what is left is as it was, and what is left out is counted
    equal     every sample is what it was
    intact    as `equal`, and a warning names the changed file
    told      values differ where nothing has a checksum, and a warning names the changed file
    edited    numbers or names differ in statistics of other makers: valid, and not to be told from
              statistics of other data

Everything else is bad: a hang, a crash, other data without a word, an error of the kind that
only a debugger can read. Prints a table and each bad one; the exit code is 1 if there is one.
Imports are done once and each reading is a fork.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import logging
import os
import pickle
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # rlds_demo, as pytest has it

import numpy as np
from rlds_demo import open_demo, write_demo

from pizero.data import RldsDataset, compute_statistics, load_statistics, save_statistics
from pizero.data.lerobot import LeRobotDataset, export_episodes
from pizero.data.rlds.synthetic import write_synthetic

LIMIT_S = 60.0
LIMIT_BYTES = 3 << 30  # on top of what the imports take
GOOD = ("clear", "skipped", "equal", "intact", "told", "edited")
BAD = ("hang", "crash", "changed", "unclear", "uncounted")


# What is read -------------------------------------------------------------------------------------


@dataclass
class Reading:
    """All samples of a data set as digests, what was left out, and what the log said."""

    samples: list[dict[str, str]] = field(default_factory=list)
    left_out: int = 0
    log: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """A data set to damage: how to write it into a folder, and how to read all of it.

    `checked` are parts of the names of files whose every bit is covered by a checksum; those of
    `believed` are taken for what they say.
    """

    write: Callable[[Path], None]
    read: Callable[[Path, str], Reading]
    modes: tuple[str, ...] = ("raise", "skip")
    checked: tuple[str, ...] = ()
    believed: tuple[str, ...] = ()


def digest(value: Any) -> str:
    if isinstance(value, dict):
        value = {k: digest(v) for k, v in sorted(value.items())}
    if isinstance(value, np.ndarray) and value.dtype != object:
        body = repr((value.dtype.str, value.shape)).encode() + np.ascontiguousarray(value).tobytes()
    else:
        body = repr(value.tolist() if isinstance(value, np.ndarray) else value).encode()
    return hashlib.blake2b(body, digest_size=8).hexdigest()


def read_samples(dataset: Any) -> Reading:
    """Every sample; with on_error skip those that cannot be read are counted, as by the loader."""
    index = dataset.index
    found = Reading(left_out=len(index.damaged) + len(index.lengths) - dataset.num_episodes)
    for i in range(len(dataset)):
        try:
            sample = dataset.read(i)
        except (ValueError, OSError) as error:
            if dataset.on_error != "skip" or not is_clear(error, index.directory, None):
                raise
            found.left_out += 1
            continue
        del sample["episode"]  # counted among those that are left
        found.samples.append({name: digest(value) for name, value in sample.items()})
    return found


def read_bridge(folder: Path, on_error: str) -> Reading:
    dataset = RldsDataset(
        path=folder,
        split="train",
        cameras={"front": "observation/image_0", "side": "observation/image_1"},
        state="observation/state",
        action="action",
        text="language_instruction",
        horizon=3,
        frames=2,
        on_error=on_error,
    )
    found = read_samples(dataset)
    if not found.left_out:
        values = {k: dataset.metadata(k) for k in ("has_language", "file_path", "episode_id")}
        found.samples.append({k: digest(v) for k, v in values.items()})
    return found


def read_plain(folder: Path, on_error: str) -> Reading:
    keys = {"state": ["observation/state", "observation/gripper"], "on_error": on_error}
    dataset = open_demo(folder, **keys)
    found = read_samples(dataset)
    if not found.left_out:
        values = {k: dataset.metadata(k) for k in ("task", "start", "success")}
        found.samples.append({k: digest(v) for k, v in values.items()})
    return found


def write_lerobot(folder: Path, **options: Any) -> None:
    """With checksums, as our writer has it."""
    data = write_demo(folder.with_name("rlds"), lengths=(5, 4, 6), shards=1)
    dataset = open_demo(data, cameras={"corner": "observation/corner"})
    export_episodes({"train": dataset}, folder / "set", fps=10, **options)
    shutil.rmtree(folder.with_name("rlds"))


def read_lerobot(folder: Path, on_error: str, *cameras: str) -> Reading:
    (path,) = (p for p in folder.iterdir() if p.is_dir())
    names = {name: f"observation.images.{name}" for name in cameras}
    dataset = LeRobotDataset(path=path, cameras=names, horizon=3, frames=2, on_error=on_error)
    return read_samples(dataset)


def copy_lerobot(version: str, folder: Path) -> None:
    """As LeRobot wrote it."""
    shutil.copytree(Path(__file__).parents[1] / "data" / "lerobot" / version, folder / version)


def write_statistics(folder: Path) -> None:
    data = write_demo(folder.with_name("statistics-data"), lengths=(5, 4), shards=1)
    statistics = compute_statistics(open_demo(data))
    for dialect in ("pizero", "octo", "openvla", "lerobot"):
        save_statistics(statistics, folder / f"{dialect}.json", dialect=dialect)
    shutil.rmtree(folder.with_name("statistics-data"))


def read_statistics(folder: Path, on_error: str) -> Reading:
    found = Reading()
    for dialect in ("pizero", "octo", "openvla", "lerobot"):
        groups = load_statistics(folder / f"{dialect}.json")
        for name, group in sorted(groups.items()):
            values = {k: getattr(group, k) for k in ("mean", "std", "min", "max", "q01", "q99")}
            found.samples.append({f"{dialect} {name} {k}": digest(v) for k, v in values.items()})
    return found


def write_bridge(folder: Path) -> None:
    write_synthetic(
        folder,
        "bridge_dataset",
        episodes={"train": 5},
        image_size=(24, 24),
        steps=(3, 7),
        shards=2,
        short_episodes=2,
    )


SUBJECTS = {
    "bridge": Subject(write_bridge, read_bridge, checked=(".tfrecord",)),
    "plain": Subject(lambda f: void(write_demo(f)), read_plain, checked=(".tfrecord",)),
    "lerobot v2.1": Subject(
        partial(copy_lerobot, "v21"), lambda f, e: read_lerobot(f, e, "front", "wrist")
    ),
    "lerobot v3.0": Subject(
        partial(copy_lerobot, "v30"), lambda f, e: read_lerobot(f, e, "front", "wrist")
    ),
    "lerobot ours": Subject(
        write_lerobot, lambda f, e: read_lerobot(f, e, "corner"), checked=("",)
    ),
    "lerobot png": Subject(
        partial(write_lerobot, images="parquet"),
        lambda f, e: read_lerobot(f, e, "corner"),
        checked=("",),
    ),
    "statistics": Subject(
        write_statistics,
        read_statistics,
        modes=("raise",),
        believed=("octo.json", "openvla.json", "lerobot.json"),
    ),
}


def void(_: Any) -> None:
    return None


# How it is damaged --------------------------------------------------------------------------------


def span(data: bytes, dice: random.Random, longest: int = 64) -> tuple[int, int]:
    start = dice.randrange(len(data))
    return start, min(len(data), start + dice.randint(1, longest))


def flip_bits(data: bytes, dice: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        out[dice.randrange(len(out))] ^= 1 << dice.randrange(8)
    return bytes(out)


def overwrite(data: bytes, dice: random.Random) -> bytes:
    start, end = span(data, dice)
    return data[:start] + dice.randbytes(end - start) + data[end:]


def overwrite_start(data: bytes, dice: random.Random) -> bytes:
    end = dice.randint(1, min(16, len(data)))
    return dice.randbytes(end) + data[end:]


def zero(data: bytes, dice: random.Random) -> bytes:
    start, end = span(data, dice, 4096)
    return data[:start] + bytes(end - start) + data[end:]


def truncate(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def cut_end(data: bytes, dice: random.Random) -> bytes:
    return data[: -dice.randint(1, min(16, len(data)))]


def empty(data: bytes, dice: random.Random) -> bytes:
    return b""


def insert(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data) + 1)
    return data[:start] + dice.randbytes(dice.randint(1, 64)) + data[start:]


def append(data: bytes, dice: random.Random) -> bytes:
    return data + dice.randbytes(dice.randint(1, 64))


def remove(data: bytes, dice: random.Random) -> bytes:
    start, end = span(data, dice)
    return data[:start] + data[end:]


def repeat(data: bytes, dice: random.Random) -> bytes:
    start, end = span(data, dice, 1024)
    return data[:end] + data[start:]


def swap_blocks(data: bytes, dice: random.Random) -> bytes:
    size = dice.randint(1, max(1, min(512, len(data) // 2)))
    a, b = sorted(dice.randrange(max(1, len(data) - size)) for _ in range(2))
    if b < a + size:
        return flip_bits(data, dice)
    middle = data[a + size : b]
    return data[:a] + data[b : b + size] + middle + data[a : a + size] + data[b + size :]


BYTES = (
    *(flip_bits, flip_bits, overwrite, overwrite_start, zero, truncate, cut_end, empty, insert),
    *(append, remove, repeat, swap_blocks),
)
_MARK = "@@duplicate@@"
_DEEP = "@@deep@@"


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value inside a JSON tree, as its container and key."""
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        found.append((tree, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def change_value(tree: Any, dice: random.Random) -> None:
    """Another number, another text, or something of another type."""
    container, key = dice.choice(places(tree))
    old = container[key]
    if isinstance(old, bool):
        options: list[Any] = [not old, None, "true"]
    elif isinstance(old, int | float):
        options = [old + 1, old - 1, -old, old * 10, 0, 0.5, 2**70, float("inf"), str(old), None]
    elif isinstance(old, str) and old.lstrip("-").isdigit():  # tfds writes numbers as text
        options = [str(int(old) + 1), str(int(old) - 1), "0", "-1", str(10**18), "x", int(old)]
    elif isinstance(old, str):
        at = dice.randrange(len(old) + 1)
        options = [old[:at] + dice.choice("aZ0_/{}.") + old[at + 1 :], "", "\0", "\ud800"]
        options += ["../" + old, old * 50, 7, None, [old]]
    else:
        options = [None, 3, "x", [], {}, [old], {"x": old}, _DEEP]
    container[key] = dice.choice(options)


def delete_key(tree: Any, dice: random.Random) -> None:
    container, key = dice.choice(places(tree))
    del container[key]


def rename_key(tree: Any, dice: random.Random) -> None:
    named = [(c, k) for c, k in places(tree) if isinstance(c, dict)]
    if not named:
        return delete_key(tree, dice)
    container, key = dice.choice(named)
    at = dice.randrange(len(key) + 1)
    container[key[:at] + dice.choice("aZ0_/") + key[at + 1 :]] = container.pop(key)
    return None


def duplicate_key(tree: Any, dice: random.Random) -> None:
    """The same name twice in one object, with two values."""
    named = [(c, k) for c, k in places(tree) if isinstance(c, dict)]
    if not named:
        return delete_key(tree, dice)
    container, key = dice.choice(named)
    like = [c[k] for c, k in named if type(c[k]) is type(container[key])]
    container[_MARK + key] = copy.deepcopy(dice.choice(like))
    return None


JSON = (change_value, change_value, change_value, delete_key, rename_key, duplicate_key)


def dump(tree: Any, **options: Any) -> str:
    text = json.dumps(tree, **options).replace(f'"{_MARK}', '"')
    return text.replace(f'"{_DEEP}"', "[" * 200_000 + "]" * 200_000)


def change_json(data: bytes, dice: random.Random) -> tuple[str, bytes]:
    tree = json.loads(data)
    change = dice.choice(JSON)
    change(tree, dice)
    return change.__name__, dump(tree, indent=1).encode("utf-8", "surrogatepass")


def change_lines(data: bytes, dice: random.Random) -> tuple[str, bytes]:
    """One line of JSON changed, or lines lost, repeated or in another order."""
    lines = data.decode().splitlines()
    at = dice.randrange(len(lines))
    kind = dice.choice(["change", "change", "change", "lose", "repeat", "swap"])
    if kind == "lose":
        del lines[at]
    elif kind == "repeat":
        lines.insert(dice.randrange(len(lines) + 1), lines[at])
    elif kind == "swap":
        other = dice.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    else:
        tree = json.loads(lines[at])
        change = dice.choice(JSON)
        change(tree, dice)
        kind, lines[at] = change.__name__, dump(tree)
    return f"{kind} line", ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def damage(path: Path, dice: random.Random) -> str:
    """Damage one file; returns what was done."""
    if dice.random() < 0.04:
        path.unlink()
        return "delete file"
    siblings = [p for p in path.parent.iterdir() if p.suffix == path.suffix and p.is_file()]
    if len(siblings) > 1 and dice.random() < 0.05:
        other = dice.choice([p for p in siblings if p != path])
        path.write_bytes(other.read_bytes())
        return f"copy of {other.name}"
    data = path.read_bytes()
    for _ in range(20):
        structured = {".json": change_json, ".jsonl": change_lines}.get(path.suffix)
        if structured is not None and dice.random() < 0.7:
            what, changed = structured(data, dice)
        else:
            change = dice.choice(BYTES)
            what, changed = change.__name__, change(data, dice)
        if changed != data:
            break
    path.write_bytes(changed)
    return what


# What came of it ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Of one mutation."""

    number: int
    subject: str
    mode: str
    file: str
    what: str
    ending: str = ""
    note: str = ""


class Lab:
    """The pristine data sets, and what they read as."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names
        self.expected: dict[tuple[str, str], Reading] = {}
        for name in names:
            place = folder / name
            place.mkdir()
            SUBJECTS[name].write(place)
            for mode in SUBJECTS[name].modes:
                ending, note, reading = run(SUBJECTS[name].read, place, mode)
                if reading is None or reading.left_out or not reading.samples:
                    raise SystemExit(f"{name} cannot be read before any damage: {ending} {note}")
                self.expected[name, mode] = reading

    def mutate(self, number: int, seed: int) -> tuple[Outcome, Path, Path]:
        """A damaged copy: the outcome so far, the copy, and the file that was damaged."""
        dice = random.Random(f"{seed} {number}")
        name = self.names[number % len(self.names)]
        place = Path(tempfile.mkdtemp(dir=self.folder, prefix=f"{number}-"))
        shutil.copytree(self.folder / name, place, dirs_exist_ok=True)
        mode = dice.choice(SUBJECTS[name].modes)
        files = sorted(p for p in place.rglob("*") if p.is_file() and p.suffix != ".lock")
        kinds = sorted({kind_of(f) for f in files})
        kind = dice.choice(kinds)
        file = dice.choice([f for f in files if kind_of(f) == kind])
        what = damage(file, dice)
        if is_checked(name, file) and dice.random() < 0.25:  # seen for the first time
            for folder in place.rglob(".pizero_index"):
                shutil.rmtree(folder)
            what += ", no index"
        relative = file.relative_to(place).as_posix()
        return Outcome(number, name, mode, relative, what), place, file

    def judge(self, outcome: Outcome, place: Path, file: Path) -> Outcome:
        """Read the damaged copy and say how it ended."""
        subject = SUBJECTS[outcome.subject]
        ending, note, reading = run(subject.read, place, outcome.mode)
        if ending == "error":
            error, lines = note
            ending = "clear" if is_clear(error, place, file) else "unclear"
            note = f"{type(error).__name__}: {error}" if ending == "clear" else lines
        if reading is not None:
            ending, note = self.compare(outcome, reading, file)
        outcome.ending, outcome.note = ending, str(note).replace(str(place), "<copy>")
        return outcome

    def compare(self, outcome: Outcome, got: Reading, file: Path) -> tuple[str, str]:
        expected = self.expected[outcome.subject, outcome.mode].samples
        is_told = any(file.name in line for line in got.log)
        if got.samples == expected and not got.left_out:
            return ("intact" if is_told else "equal"), ""
        known = {json.dumps(s, sort_keys=True) for s in expected}
        same = [json.dumps(s, sort_keys=True) in known for s in got.samples]
        if got.left_out and all(same):
            return "skipped", f"{got.left_out} left out"
        wrong = [i for i, ok in enumerate(same) if not ok]
        fields = Counter(
            key
            for i in wrong
            for key, value in got.samples[i].items()
            if i < len(expected) and expected[i].get(key) != value
        )
        note = (
            f"{len(got.samples)} samples of {len(expected)}, {len(wrong)} differ in "
            f"{', '.join(fields) or 'order'}, {got.left_out} left out"
        )
        if is_told and not is_checked(outcome.subject, file):
            return "told", note
        if file.name in SUBJECTS[outcome.subject].believed:
            return "edited", note
        if len(got.samples) < len(expected) and all(same):
            return "uncounted", note
        return "changed", note


def is_checked(subject: str, file: Path) -> bool:
    """Every bit of the file is covered by a checksum that comes with the data set."""
    of_ours = ".pizero_index" in file.parts
    return not of_ours and any(part in file.name for part in SUBJECTS[subject].checked)


def is_clear(error: BaseException, folder: Path, file: Path | None) -> bool:
    """It is of a kind that people are shown, and it says which file or data set."""
    kinds = (ValueError, OSError)
    of_ours = type(error) in kinds or type(error).__module__.startswith("pizero")
    of_the_system = isinstance(error, OSError) and error.filename is not None
    if not isinstance(error, kinds) or not (of_ours or of_the_system):
        return False
    text = str(error)
    return str(folder) in text or (file is not None and file.name in text)


def run(
    read: Callable[[Path, str], Reading], folder: Path, mode: str
) -> tuple[str, Any, Reading | None]:
    """Read in a forked process: how it ended, a note, and the reading if there is one."""
    pipe_in, pipe_out = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(pipe_in)
        _work(read, folder, mode, pipe_out)
    os.close(pipe_out)
    deadline, received = time.monotonic() + LIMIT_S, b""
    while True:
        ready, _, _ = select.select([pipe_in], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(pipe_in, 1 << 20)
        if not piece:
            break
        received += piece
    os.close(pipe_in)
    _, status = os.waitpid(child, 0)
    if not ready:
        return "hang", f"no end after {LIMIT_S:.0f} s", None
    if status or not received:
        return "crash", f"wait status {status}", None
    kind, content = pickle.loads(received)
    return (kind, content, None) if kind == "error" else (kind, "", content)


class Told(Exception):
    """Stands for an error that cannot be pickled."""


def _work(read: Callable[[Path, str], Reading], folder: Path, mode: str, pipe: int) -> None:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().handlers[:] = [handler]
    warnings.simplefilter("ignore")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # decoders speak their mind
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES, resource.RLIM_INFINITY))
    result: tuple[str, Any]
    try:
        reading = read(folder, mode)
        reading.log = lines
        result = ("read", reading)
    except BaseException as error:
        text = "".join(traceback.format_exception(error)[-12:])[-3000:]
        kept: BaseException = error
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            kept = Told(f"{type(error).__name__}: {error}")
        kept.__traceback__ = kept.__cause__ = kept.__context__ = None
        result = ("error", (kept, text))
    content = pickle.dumps(result)
    while content:
        content = content[os.write(pipe, content) :]
    os._exit(0)


def kind_of(file: Path) -> str:
    """What files are alike: each kind is damaged as often as the others."""
    if ".pizero_index" in file.parts:
        return "index manifest" if file.suffix == ".json" else f"index {file.suffix}"
    if ".tfrecord" in file.name:
        return "tfrecord"
    return file.name if file.suffix in (".json", ".jsonl") else file.suffix


# --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--show", type=int, help="the number of one mutation")
    parser.add_argument("--out", type=Path, help="all outcomes as JSON lines")
    options = parser.parse_args(arguments)
    os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir()) / "mutate-data-cache")
    with tempfile.TemporaryDirectory(prefix="mutate-data-") as folder:
        lab = Lab(Path(folder), options.only)
        outcomes = []
        for number in range(options.count) if options.show is None else [options.show]:
            outcome, place, file = lab.mutate(number, options.seed)
            outcomes.append(lab.judge(outcome, place, file))
            shutil.rmtree(place)
    if options.out is not None:
        options.out.write_text("".join(json.dumps(vars(o)) + "\n" for o in outcomes))
    report(outcomes, shows=options.show is not None)
    return int(any(o.ending in BAD for o in outcomes))


def report(outcomes: list[Outcome], *, shows: bool) -> None:
    table = Counter((o.subject, kind_of(Path(o.file)), o.ending) for o in outcomes)
    rows = sorted({(subject, kind) for subject, kind, _ in table})
    used = [e for e in (*GOOD, *BAD) if any(o.ending == e for o in outcomes)]
    print(f"{'data set':12} {'file':24}" + "".join(f"{e:>10}" for e in used))
    for subject, kind in rows:
        counts = "".join(f"{table[subject, kind, e] or '':>10}" for e in used)
        print(f"{subject:12} {kind:24}{counts}")
    print(f"{'all':37}" + "".join(f"{sum(o.ending == e for o in outcomes):>10}" for e in used))
    for o in outcomes:
        if shows or o.ending in BAD:
            print(f"\n{o.number}: {o.ending}: {o.subject}, {o.file}, {o.what}, on_error: {o.mode}")
            print(f"    {o.note}")


if __name__ == "__main__":
    raise SystemExit(main())
