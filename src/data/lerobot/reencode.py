"""Encode the videos of a LeRobot set anew, for random access, each in its place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from pizero.data.files import write_whole
from pizero.data.lerobot.checksums import read_checksums, update_checksums, verify_file
from pizero.data.lerobot.encode import ENCODERS, GOP, VideoEncoder, check_codec, default_codec
from pizero.data.lerobot.files import INFO, is_snapshot, read_json
from pizero.data.lerobot.meta import read_meta
from pizero.data.lerobot.video import VideoFacts, probe_video
from pizero.data.lerobot.writer import video_info
from pizero.data.workers import Workers


def reencode_set(
    directory: Path,
    *,
    codec: str | None = None,
    crf: int | None = None,
    gop: int = GOP,
    num_workers: int = 0,
) -> tuple[int, list[str]]:
    """Encode every video of a set so; returns how many were not, and what is wrong with others.

    `codec` None keeps a file's own, where it can be encoded. Files that are so already are left
    alone, so a run that was stopped continues. What `features` says of the videos follows, and so
    does SHA256SUMS.
    """
    if is_snapshot(directory):
        raise ValueError(f"{directory} belongs to the Hub's cache; copy the set to encode it anew")
    if codec is not None:
        check_codec(codec)
    meta = read_meta(directory)
    names = [name for place in meta.videos.values() for name in place.files]
    sums = read_checksums(directory)
    encode = partial(_try, codec=codec, crf=crf, gop=gop)
    done: list[str] = []
    problems: list[str] = []
    try:
        with Workers(num_workers) as workers:
            jobs = [(directory / name, sums.get(name)) for name in names]
            results = workers(encode, jobs, what=f"encoding {len(jobs)} videos")
            for name, result in zip(names, results, strict=True):
                if isinstance(result, str):
                    problems.append(result)
                elif result:
                    done.append(name)
    finally:  # also when it is interrupted
        update_checksums(directory, done)
    _describe(directory, {key: place.files[0] for key, place in meta.videos.items()})
    return len(done), problems


def _describe(directory: Path, videos: Mapping[str, str]) -> None:
    """Say in `features` what the first video of each camera is like."""
    info = read_json(directory / INFO)
    for key, name in videos.items():
        node = info["features"][key]
        where = "video_info" if "video_info" in node else "info"
        try:
            node[where] = {**(node.get(where) or {}), **video_info(directory / name)}
        except ValueError:
            continue  # it is among the problems
    text = json.dumps(info, indent=4)
    if text != (directory / INFO).read_text():
        write_whole(directory / INFO, text)
        update_checksums(directory, [INFO])


def reencode(
    path: Path, *, codec: str | None = None, crf: int | None = None, gop: int = GOP
) -> bool:
    """Encode a file anew, in its place; False if it is of that codec and distance already.

    The new file gets its name only after it was found to have as many frames as the old one. All
    frames are decoded one after the other, so damage stops it (ValueError), and the file stays.
    """
    facts = probe_video(path)
    if codec is None:
        codec = facts.codec if facts.codec in ENCODERS else default_codec()
    if facts.codec == codec and facts.gop <= gop:
        return False
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with av.open(str(path)) as source:
            frames = _encode(source, temporary, facts, {"codec": codec, "crf": crf, "gop": gop})
        got = probe_video(temporary)
        if (got.frames, frames) != (facts.frames, facts.frames):
            raise ValueError(
                f"{path}: expected {facts.frames} frames, decoded {frames} and wrote {got.frames}; "
                "the file stays as it was"
            )
        if abs(got.fps - facts.fps) > 1e-3 * facts.fps or got.gop > gop:
            raise ValueError(f"{path}: encoding {facts} gave {got}; the file stays as it was")
        os.chmod(temporary, path.stat().st_mode & 0o777)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be encoded anew: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _encode(source: Any, path: Path, facts: VideoFacts, options: Mapping[str, Any]) -> int:
    """Write the frames of an opened video to another file; returns how many there were."""
    stream = source.streams.video[0]
    rate, start = stream.average_rate, None
    encoder = VideoEncoder(
        path, fps=rate, height=facts.height, width=facts.width, like=stream, **options
    )
    with closing(encoder):
        for frame in source.decode(stream):
            start = frame.time if start is None else start
            if abs(frame.time - start - encoder.frames / rate) > 0.5 / rate:
                raise ValueError(
                    f"frame {encoder.frames} is shown at {frame.time:.4f} s; expected a constant "
                    f"rate of {float(rate):g} frames per second"
                )
            encoder.add_frame(frame)
    return encoder.frames


def _try(
    job: tuple[Path, str | None], *, codec: str | None, crf: int | None, gop: int
) -> bool | str:
    """Whether a file was encoded anew, or why it could not be."""
    path, digest = job
    try:
        if digest is not None:
            verify_file(path, digest)
        return reencode(path, codec=codec, crf=crf, gop=gop)
    except ValueError as error:
        return str(error)
