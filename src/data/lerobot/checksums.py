"""SHA256SUMS: the checksums of a set's files, as `sha256sum` writes and checks them.

LeRobot's formats have none, and a video decodes into other pictures after a flipped bit. Sets that
are written here have the file; anyone can make it for another set:

    find meta data videos -type f -print0 | xargs -0 sha256sum > SHA256SUMS
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pizero.data.files import write_whole
from pizero.data.workers import Workers

CHECKSUMS = "SHA256SUMS"


def write_checksums(directory: Path, files: Iterable[str]) -> None:
    """Write the file anew, for files named below the directory."""
    _write(directory, {name: _digest(directory / name) for name in sorted(files)})


def update_checksums(directory: Path, files: Iterable[str]) -> None:
    """Write the lines of some files anew, where the directory has checksums."""
    sums = read_checksums(directory)
    if sums:
        _write(directory, sums | {name: _digest(directory / name) for name in files})


def read_checksums(directory: Path) -> dict[str, str]:
    """The checksum of each file, by its name below the directory; none without the file."""
    path = directory / CHECKSUMS
    sums: dict[str, str] = {}
    if not path.is_file():
        return sums
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        digest, _, name = line.partition(" ")
        name = name[1:]  # a space or a star
        if len(digest) != 64 or not name:
            raise ValueError(f"{path}, line {number}: expected a checksum and a file, got {line!r}")
        sums[name.removeprefix("./")] = digest
    return sums


def verify_checksums(directory: Path, files: Iterable[str], workers: Workers) -> None:
    """Compare every file with its checksum, if there are any; ValueError tells what differs."""
    if not (directory / CHECKSUMS).is_file():
        return
    sums = read_checksums(directory)
    names = sorted(name for name in files if name.startswith(("meta/", "data/", "videos/")))
    for name in names:
        if name not in sums:
            raise ValueError(f"{directory}/{CHECKSUMS} has no line for {name}; {_ADVICE}")
    jobs = [(directory / name, sums[name]) for name in names]
    for _ in workers(_verify, jobs, what=f"comparing checksums of {directory.name}"):
        pass


def verify_file(path: Path, expected: str) -> None:
    """Compare one file with its checksum."""
    if (got := _digest(path)) != expected:
        raise ValueError(
            f"{path}: expected SHA-256 {expected[:12]}... as in {CHECKSUMS}, got {got[:12]}...; "
            f"{_ADVICE}"
        )


_ADVICE = (
    "copy the data again, or, if it was changed on purpose, remove that file or write it anew with "
    "sha256sum"
)


def _verify(job: tuple[Path, str]) -> None:
    verify_file(*job)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(directory: Path, sums: Mapping[str, str]) -> None:
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    write_whole(directory / CHECKSUMS, "".join(lines))
