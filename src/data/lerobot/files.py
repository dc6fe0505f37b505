"""Find a LeRobot data set on this machine, and read its JSON and parquet files.

Whatever is wrong with a file becomes a ValueError that names it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pizero.data.files import parse_json

VERSIONS = ("v2.0", "v2.1", "v3.0")
INFO = "meta/info.json"


def find_set(path: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a set: `path` itself, or a local copy of the Hub's data set of that name.

    Copies are looked for where LeRobot and huggingface_hub put them; nothing is downloaded.
    `revision` (a branch, tag or commit) chooses among the Hub's snapshots. ValueError lists the
    places.
    """
    looked = [Path(path).expanduser(), *_copies(str(path), revision)]
    for place in looked:
        if (place / INFO).is_file():
            return place.resolve()
    places = "\n  ".join(map(str, looked))
    raise ValueError(f"no LeRobot data set {str(path)!r}: there is no {INFO} in\n  {places}")


def is_snapshot(directory: Path) -> bool:
    """Whether a folder belongs to the Hub's cache, which nothing is to be added to."""
    parents = directory.parents
    return len(parents) > 1 and directory.parent.name == "snapshots" and "--" in parents[1].name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return _object(_text(path), str(path))


def read_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a JSON-lines file, each with words for where it stands."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(line, where), where


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file, with the checksums of its pages verified where it has any."""
    with parquet_errors(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


def read_table(path: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> pa.Table:
    """The wanted columns of a parquet file."""
    file = open_parquet(path)
    with parquet_errors(path):
        names = [name for name in file.schema_arrow.names if is_wanted(name)]
        return file.read(columns=names, use_threads=False)


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Within it, what pyarrow raises becomes a ValueError naming the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a whole parquet file: {error}") from error


def _copies(name: str, revision: str | None) -> Iterator[Path]:
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        return
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    lerobot = Path(os.environ.get("HF_LEROBOT_HOME") or home / "lerobot").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    yield lerobot / name
    for cache in (lerobot / "hub", hub):
        yield _snapshot(cache / f"datasets--{name.replace('/', '--')}", revision)


def _snapshot(repository: Path, revision: str | None) -> Path:
    """A folder of the Hub's cache: that of `revision`, or of the newest version's tag, or main."""
    snapshots = repository / "snapshots"
    for name in [revision] if revision else [*reversed(VERSIONS), "main"]:
        reference = repository / "refs" / name
        if reference.is_file():
            return snapshots / reference.read_text().strip()
        if (snapshots / name).is_dir():
            return snapshots / name
    found = sorted(snapshots.glob("*/")) if not revision else []
    return found[0] if len(found) == 1 else snapshots / (revision or "*")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from error


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: expected an object, got {type(tree).__name__}")
    return tree
