"""The arrays of a split on disk, memory mapped: what data sets of every format are read through.

    <home>/<split>-<key>/manifest.json     files, columns, string table, what was left out
                         steps.<key>.npy   one row per step
                         episode.<key>.npy one row per episode
                         episodes.npy      first row, length and file of each episode

An index is made once, by one process while the others wait, and is whole or absent. `key` covers
the files it was made from, so changed data get a new index.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import numpy as np

from pizero.data.checksum import crc_of_file
from pizero.data.files import parse_json

SCHEMA = 4
MANIFEST = "manifest.json"
OWN = "index:"  # before a file's name: it lies in the index's folder, not in the data set's

Tables = dict[str, np.ndarray]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """What a column holds.

    tensor  [rows *shape]
    text    int32 [rows], numbers into the string table
    image   int64 [rows 2], offset and size in the episode's file
    video   int64 [episodes 2], a file and the frame in it that is the episode's first
    ragged  the values of all rows [n *shape]; a second array tells where each row ends
    """

    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass
class Contents:
    """All that an index is written from; `tables` by column, e.g. `steps.observation/state`."""

    files: list[str]
    columns: dict[str, Column]
    tables: Tables
    strings: list[str]
    stamps: dict[str, list[int]]  # size and time of each file the index was made from
    absent: dict[str, str] = field(default_factory=dict)  # columns that are not there, and why
    damaged: list[str] = field(default_factory=list)  # what was left out on reading, one line each
    facts: dict[str, Any] = field(default_factory=dict)  # of the format, e.g. frames per second

    def write(self, folder: Path) -> None:
        """Write the arrays and the manifest into an empty folder."""
        description = {
            "files": self.files,
            "columns": {name: asdict(column) for name, column in self.columns.items()},
            "strings": self.strings,
            "stamps": self.stamps,
            "absent": self.absent,
            "damaged": self.damaged,
            "facts": self.facts,
        }
        write_arrays(folder, self.tables, description)


class ArrayFolder:
    """Arrays and a manifest in a folder of ours.

    Both are compared with their checksums on first use, so damage is an error and not other data;
    then arrays are mapped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, np.ndarray] = {}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What was written with the arrays; ValueError if it is not what was written."""
        try:
            manifest = parse_json((self.folder / MANIFEST).read_text())
            if manifest.pop("digest") != fingerprint(manifest):
                raise ValueError("the manifest is not what was written")
            return manifest
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(error) from error

    def array(self, name: str) -> np.ndarray:
        """A mapped array by the name it was written with."""
        if name not in self._arrays:
            path = self.folder / file_name(name)
            try:
                found = [path.stat().st_size, crc_of_file(path)]
                if found != self.manifest["arrays"][path.name]:
                    raise ValueError(f"{path.name} does not match its checksum")
                mapped = np.load(path, mmap_mode="r")
            except (OSError, ValueError, KeyError) as error:
                raise self._damaged(error) from error
            self._arrays[name] = mapped.view(np.ndarray)  # without the cost of the memmap class
        return self._arrays[name]

    def has_array(self, name: str) -> bool:
        """Whether an array of this name was written."""
        return file_name(name) in self.manifest["arrays"]

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.folder} is damaged ({error}); it was made from the data: remove that folder "
            "and it is made again"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class Index(ArrayFolder):
    """An opened index. Arrays are mapped on first use and dropped when pickled.

    `starts` and `lengths` [episodes] are rows of the step tables; `shard` [episodes] says which of
    `files` holds an episode's images.
    """

    def __init__(self, folder: Path, directory: Path) -> None:
        super().__init__(folder)
        self.directory = directory
        self._columns: dict[tuple[str, str, str], np.ndarray] = {}

    @cached_property
    def files(self) -> list[str]:
        """Absolute paths of the files that images are read from."""
        return [
            str(
                self.folder / name.removeprefix(OWN)
                if name.startswith(OWN)
                else self.directory / name
            )
            for name in self.manifest["files"]
        ]

    @cached_property
    def strings(self) -> list[str]:
        """The distinct texts; text columns hold numbers into this list."""
        return self.manifest["strings"]

    @cached_property
    def columns(self) -> dict[str, dict[str, Column]]:
        """The columns of the groups `steps` and `episode` by key."""
        found: dict[str, dict[str, Column]] = {"steps": {}, "episode": {}}
        for name, c in self.manifest["columns"].items():
            group, _, key = name.partition(".")
            found[group][key] = Column(c["kind"], c["dtype"], tuple(c["shape"]))
        return found

    @property
    def damaged(self) -> list[str]:
        """Records that were left out because they are damaged, one line each."""
        return self.manifest["damaged"]

    @property
    def facts(self) -> dict[str, Any]:
        """What the format says beside the arrays, e.g. frames per second."""
        return self.manifest["facts"]

    @cached_property
    def _episodes(self) -> np.ndarray:
        return self.array("episodes")

    @property
    def starts(self) -> np.ndarray:
        """First row of each episode in the step tables."""
        return self._episodes[:, 0]

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode."""
        return self._episodes[:, 1]

    @property
    def shard(self) -> np.ndarray:
        """The file that holds each episode, as a position in `files`."""
        return self._episodes[:, 2]

    def step_values(self, key: str, kind: str = "any") -> np.ndarray:
        """The array of a key of the steps, which must be of the kind; see Column for its form."""
        return self._column("steps", key, kind)

    def episode_values(self, key: str) -> np.ndarray:
        """The array of a key outside the steps, e.g. `episode_metadata/task`."""
        return self._column("episode", key, "any")

    def row_ends(self, key: str) -> np.ndarray:
        """Where each step's values end in the flat values of a ragged key, int64 [steps]."""
        self._check("steps", key, "ragged")
        return self.array(f"steps.{key}.ends")

    def image_crcs(self, key: str) -> np.ndarray | None:
        """CRC32C of each image's bytes, uint32 [steps]; None where they were not read."""
        name = f"steps.{key}.crc"
        return self.array(name) if self.has_array(name) else None

    def texts(self, numbers: np.ndarray) -> list[str]:
        """The strings that a text column stands for."""
        return [self.strings[n] for n in numbers]

    def _column(self, group: str, key: str, kind: str) -> np.ndarray:
        column = self._columns.get((group, key, kind))
        if column is None:
            self._check(group, key, kind)
            column = self._columns[group, key, kind] = self.array(f"{group}.{key}")
        return column

    def _check(self, group: str, key: str, kind: str) -> None:
        stored = self.columns[group]
        where = f"{self.directory} ({group})"
        if key not in stored and (reason := self.manifest["absent"].get(f"{group}.{key}")):
            raise ValueError(f"{where}: {key!r} is not in the index: {reason}")
        if key not in stored or kind not in ("any", stored[key].kind):
            choices = [k for k, c in stored.items() if kind in ("any", c.kind)]
            raise unknown_key(key, choices, where=f"{where}, {kind} features,")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "directory": self.directory}


def write_arrays(
    folder: Path, arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]
) -> None:
    """Write arrays and a manifest as ArrayFolder reads them; `description` is plain values."""
    written = {}
    for name, array in arrays.items():
        path = folder / file_name(name)
        np.save(path, array)
        written[path.name] = [path.stat().st_size, crc_of_file(path)]
    manifest = {**description, "arrays": written}
    manifest = json.loads(json.dumps(manifest))  # tuples are lists from here on
    (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": fingerprint(manifest)}))


def homes(directory: Path) -> list[Path]:
    """Where an index of a data set may lie: beside the data or in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{directory.parent.name}-{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"
    beside = directory / ".pizero_index"
    # A folder without any write bit is meant to stay as it is, even for root.
    is_read_only = not directory.stat().st_mode & 0o222 and not beside.exists()
    return [*([] if is_read_only else [beside]), cache / "pizero" / "index" / name]


def stamps(directory: Path, files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change (ns) of files, by their name below the data set's folder."""
    found = {}
    for file in files:
        stat = file.stat()
        found[file.relative_to(directory).as_posix()] = [stat.st_size, stat.st_mtime_ns]
    return found


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits that change with any of the parts (plain values)."""
    return hashlib.sha256(json.dumps([SCHEMA, *parts], sort_keys=True).encode()).hexdigest()[:16]


def make_once(places: Sequence[Path], name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` in the first place that has it, or that takes it: then `make` fills it.

    One process makes it, the others wait for that one. `make` gets a temporary folder, which is
    renamed when it returns. ValueError if no place can be written.
    """
    for home in places:
        if (home / name / MANIFEST).exists():
            return home / name
    if getattr(current_process(), "_inheriting", False):
        # Waiting for the lock would be for ever: the process that holds it waits for this one.
        raise RuntimeError(
            "a process that was started to help imports the script, which opens the data set "
            "again; put what the script does under `if __name__ == '__main__':`"
        )
    for home in places:
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock = (home / f"{name.rpartition('-')[0] or name}.lock").open("w")
        except OSError:  # read-only data; the user's cache comes next
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder = home / name
            if not (folder / MANIFEST).exists():
                _make(folder, make)
            return folder
    raise ValueError(f"nowhere to write an index; tried {', '.join(map(str, places))}")


def say_what_changed(places: Sequence[Path], split: str, now: Mapping[str, list[int]]) -> None:
    """Log which files differ from those of an earlier index of the split, if there is one."""
    earlier = [m for home in places for m in home.glob(f"{split}-*/{MANIFEST}")]
    for manifest in sorted(earlier, key=lambda m: m.stat().st_mtime)[-1:]:
        try:
            before = json.loads(manifest.read_text())["stamps"]
        except (OSError, ValueError, KeyError):
            continue
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if changed:
            log.warning(
                "%d of %d files changed since %s was indexed and are read as they are now: %s",
                *(len(changed), len(before.keys() | now.keys()), split),
                ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else ""),
            )


def unknown_key(key: str, known: Iterable[str], *, where: str) -> ValueError:
    """An error for a key that is not there: lists what is, and the nearest name."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"{where} has no {key!r}{hint} It has: {', '.join(names) or 'nothing'}")


def file_name(column: str) -> str:
    """The file of a column; keys have slashes."""
    return column.replace("/", "__") + ".npy"


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        make(temporary)
        os.chmod(temporary, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
