"""Frames of video files by number, decoded on demand.

torchcodec decodes where it can be imported, PyAV otherwise; both give the same pixels. A process
keeps a bounded number of decoders open, which are its own: a fork begins without any.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

BACKENDS = ("torchcodec", "pyav")
OPEN_DECODERS = 16  # per process; each takes a few megabytes
TOLERANCE = 1e-4  # seconds by which a frame's time may differ from number / fps, as in LeRobot
LONG_GOP = 10  # frames from one key frame to the next, beyond which random access gets slow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoFacts:
    """What the container says, found without decoding."""

    frames: int
    fps: float
    height: int
    width: int
    codec: str
    pix_fmt: str
    gop: int  # the longest distance between key frames


class VideoReader:
    """Reads frames by number from any of the files.

    `tolerance_s` is how far a frame's time may be from number / fps. `backend` None takes
    torchcodec where it works, else PyAV.
    """

    def __init__(self, *, backend: str | None = None, tolerance_s: float = TOLERANCE) -> None:
        if backend not in (None, *BACKENDS):
            raise ValueError(f"expected video backend {' or '.join(BACKENDS)}, got {backend!r}")
        if backend == "torchcodec" and _torchcodec() is None:
            raise ValueError(f"torchcodec does not load here: {_why_no_torchcodec()}")
        self.backend, self.tolerance_s = backend, tolerance_s

    def read(self, path: str, frames: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [n h w 3], in the order of the numbers; ValueError names the file and the frame.

        Each distinct frame is decoded once, in one pass through the file.
        """
        wanted, places = np.unique(np.asarray(frames, np.int64), return_inverse=True)
        with _open_decoders.use(path, self.backend, self.tolerance_s) as decoder:
            if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < decoder.frames:
                raise ValueError(
                    f"{path}: expected frame numbers in 0..{decoder.frames - 1}, got {wanted[0]}.."
                    f"{wanted[-1]}"
                )
            try:
                images = decoder.decode(wanted.tolist())
            except ValueError as error:
                raise ValueError(f"{path}, {_name(wanted)}: {error}") from error
        return images[places]


def num_open() -> int:
    """Decoders that are open in this process."""
    return len(_open_decoders.decoders)


def probe_video(path: str | Path) -> VideoFacts:
    """What the container of a video says; ValueError if it is damaged or holds no video."""
    try:
        with av.open(str(path)) as container:
            stream = _stream(container)
            entries = stream.index_entries
            keys = [i for i, entry in enumerate(entries) if entry.is_keyframe]
            facts = VideoFacts(
                frames=stream.frames or len(entries),
                fps=float(stream.average_rate or 0),
                height=stream.height,
                width=stream.width,
                codec=stream.codec_context.codec.canonical_name,
                pix_fmt=str(stream.codec_context.pix_fmt),
                gop=int(np.diff([*keys, len(entries)]).max(initial=0)),
            )
            end = max((entry.pos + entry.size for entry in entries), default=0)
    except (FFmpegError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a whole video: {_words(error)}") from error
    if not facts.frames or not facts.fps:
        raise ValueError(f"{path}: expected a video with frames, got {facts}")
    if end > (size := os.path.getsize(path)):
        raise ValueError(f"{path}: the file ends early: expected at least {end} bytes, got {size}")
    return facts


# -- decoders -------------------------------------------------------------------------------------


class _OpenDecoders:
    """The decoders of this process; the least recently used one is closed for another."""

    def __init__(self) -> None:
        self.decoders: OrderedDict[tuple, _Decoder] = OrderedDict()
        self.lock = threading.RLock()  # a decoder serves one thread at a time

    @contextmanager
    def use(self, path: str, backend: str | None, tolerance_s: float) -> Iterator[_Decoder]:
        """The decoder of a file; after an error it is dropped, as its state is unknown then."""
        try:
            stat = os.stat(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        # a file that was replaced meanwhile is another one
        key = (path, stat.st_size, stat.st_mtime_ns, backend, tolerance_s)
        with self.lock:
            decoder = self.decoders.pop(key, None)
            if decoder is None:
                while len(self.decoders) >= OPEN_DECODERS:
                    self.decoders.popitem(last=False)[1].close()
                decoder = _open(path, backend, tolerance_s)
            yield decoder
            self.decoders[key] = decoder  # behind all others


class _Decoder(Protocol):
    frames: int

    def decode(self, frames: list[int]) -> np.ndarray:
        """uint8 [n h w 3] of increasing numbers."""
        ...

    def close(self) -> None: ...


class _TorchcodecDecoder:
    def __init__(self, path: str, tolerance_s: float) -> None:
        self._path, self._tolerance = path, tolerance_s
        # Exact seeking reads the whole file at every opening. Approximate seeking goes by time, and
        # the time of what it finds is checked; where that is wrong, exact seeking takes over.
        self._is_exact = False
        self._open()

    def _open(self) -> None:
        mode = "exact" if self._is_exact else "approximate"
        options = {"num_ffmpeg_threads": 1, "dimension_order": "NHWC"}
        self._decoder = _torchcodec()(self._path, seek_mode=mode, **options)
        facts = self._decoder.metadata
        self.frames, self._fps = int(facts.num_frames), float(facts.average_fps)
        self._start = float(facts.begin_stream_seconds or 0.0)

    def decode(self, frames: list[int]) -> np.ndarray:
        try:
            try:
                return self._decode(frames)
            except (ValueError, RuntimeError, IndexError):
                if self._is_exact:
                    raise
            self._is_exact = True
            self._open()
            return self._decode(frames)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"cannot be decoded: {_words(error)}") from error

    def _decode(self, frames: list[int]) -> np.ndarray:
        batch = self._decoder.get_frames_at(frames)
        times = batch.pts_seconds.numpy() - self._start
        for frame, time in zip(frames, times.tolist(), strict=True):
            _check_time(frame, time, self._fps, self._tolerance)
        return batch.data.numpy()

    def close(self) -> None:
        del self._decoder


class _PyavDecoder:
    def __init__(self, path: str, tolerance_s: float) -> None:
        self._container = av.open(path)
        self._stream = stream = _stream(self._container)
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        # Damage shall raise instead of being painted over.
        stream.codec_context.options = {"err_detect": "explode", "strict": "1"}
        self.frames, self._tolerance = stream.frames or len(stream.index_entries), tolerance_s
        assert stream.average_rate is not None
        assert stream.time_base is not None
        self._fps, self._ticks = float(stream.average_rate), 1 / stream.time_base
        self._start = stream.start_time or 0
        self._keys = np.array(
            [i for i, entry in enumerate(stream.index_entries) if entry.is_keyframe], np.int64
        )
        self._reformatter = VideoReformatter()
        self._decoded: Iterator[av.VideoFrame] = iter(())
        self._last = -1  # the number of the frame that was decoded last

    def decode(self, frames: list[int]) -> np.ndarray:
        try:
            return np.stack([self._frame(frame) for frame in frames])
        except (FFmpegError, OSError, EOFError) as error:
            raise ValueError(f"cannot be decoded: {_words(error)}") from error

    def close(self) -> None:
        self._decoded = iter(())
        self._container.close()

    def _frame(self, number: int) -> np.ndarray:
        if not self._is_ahead(number):
            self._seek(number, back=0)
        for attempt in range(1, 8):
            found = self._advance(number)
            if found is not None:
                break
            self._seek(number, back=2**attempt)  # it came from behind the frame: begin earlier
        else:
            raise ValueError(f"frame {number} is not where the container says")
        if found.is_corrupt:
            raise ValueError(f"frame {number} is damaged")
        assert found.pts is not None
        time = float((found.pts - self._start) / self._ticks)
        _check_time(number, time, self._fps, self._tolerance)
        return self._reformatter.reformat(found, format="rgb24", threads=1).to_ndarray()

    def _is_ahead(self, number: int) -> bool:
        """Whether the frame comes by decoding on, without a key frame to jump to in between."""
        if self._last < 0 or number <= self._last:
            return False
        between = np.searchsorted(self._keys, [self._last, number], side="right")
        return bool(between[0] == between[1])

    def _seek(self, number: int, *, back: int) -> None:
        target = self._start + round(max(0, number - back) / self._fps * self._ticks)
        self._container.seek(target, stream=self._stream, backward=True)
        self._decoded = self._container.decode(self._stream)
        self._last = -1

    def _advance(self, number: int) -> av.VideoFrame | None:
        """The frame of that number from those that follow; None if they begin behind it."""
        is_first = self._last < 0
        for frame in self._decoded:
            if frame.pts is None:
                raise ValueError("a frame has no time")
            self._last = round(float((frame.pts - self._start) / self._ticks) * self._fps)
            if self._last >= number:
                return None if is_first and self._last > number else frame
            is_first = False
        raise ValueError("the video ends before it")


def _open(path: str, backend: str | None, tolerance_s: float) -> _Decoder:
    use_torchcodec = _torchcodec() is not None if backend is None else backend == "torchcodec"
    try:
        return (_TorchcodecDecoder if use_torchcodec else _PyavDecoder)(path, tolerance_s)
    except (FFmpegError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole video: {_words(error)}") from error


def _check_time(frame: int, time: float, fps: float, tolerance: float) -> None:
    if abs(time - frame / fps) > tolerance:
        raise ValueError(
            f"frame {frame} is shown at {time:.6f} s; expected {frame / fps:.6f} s at {fps:g} "
            f"frames per second, within {tolerance:g} s"
        )


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("it holds no video")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError("it is of a codec that nothing here decodes")
    return stream


@lru_cache(maxsize=1)
def _torchcodec() -> Any:
    """torchcodec's decoder class, or None where it, or an FFmpeg it can use, is missing."""
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError):
        return None
    return VideoDecoder


def _why_no_torchcodec() -> str:
    try:
        import torchcodec.decoders  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError) as error:
        return _words(error)
    return "unknown"


def _words(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _name(frames: np.ndarray) -> str:
    return f"frame {frames[0]}" if len(frames) == 1 else f"frames {frames[0]}..{frames[-1]}"


def _begin_anew() -> None:
    """In a fork: closing what the parent opened would wait for threads that only the parent has."""
    global _open_decoders
    _of_parents.append(_open_decoders)
    _open_decoders = _OpenDecoders()


_of_parents: list[_OpenDecoders] = []  # kept, so that nothing closes them
_open_decoders = _OpenDecoders()
os.register_at_fork(after_in_child=_begin_anew)
