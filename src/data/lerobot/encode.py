"""Video files for random access: few frames from one key frame to the next, AV1 as LeRobot's."""

from __future__ import annotations

import os
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange

ENCODERS = {
    "av1": ("libsvtav1", {"preset": "10"}),
    "h264": ("libx264", {"preset": "medium", "bf": "0"}),
}
CRF = {"av1": 30, "h264": 23}  # of about the same quality
GOP = 2


class VideoEncoder:
    """Writes one video file, frame by frame: yuv420p of one size, at a constant rate.

    `codec` is av1 or h264, `crf` its quality (smaller is better; None: the usual one), `gop` the
    distance of key frames. `like` is a video whose colours mean the same. The file is whole after
    `close`.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: Fraction | int,
        height: int,
        width: int,
        codec: str = "av1",
        crf: int | None = None,
        gop: int = GOP,
        like: av.VideoStream | None = None,
    ) -> None:
        check_codec(codec)
        if height % 2 or width % 2:
            raise ValueError(
                f"{path}: expected an even height and width, which yuv420p needs, got {height} x "
                f"{width}; pictures of any size can be kept in parquet (images='parquet')"
            )
        encoder, options = ENCODERS[codec]
        self.shape, self.frames, self.bytes = (height, width, 3), 0, 0
        self._rate = Fraction(fps)
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        self._stream: Any = self._container.add_stream(encoder, rate=self._rate)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        quality = CRF[codec] if crf is None else crf
        if like is not None:
            self._keep_colours(like)
        self._stream.options = {"g": str(gop), "crf": str(quality), **options}

    def add(self, image: np.ndarray) -> None:
        """Append one frame, uint8 [h w 3]."""
        if image.shape != self.shape or image.dtype != np.uint8:
            raise ValueError(
                f"expected uint8 {list(self.shape)} as the first picture of its camera, got "
                f"{image.dtype} {list(image.shape)}"
            )
        self._encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))

    def add_frame(self, frame: av.VideoFrame) -> None:
        """Append one decoded frame; its time is not used."""
        self._encode(frame)

    def close(self) -> None:
        """Write what is left and the table of contents."""
        for packet in self._stream.encode(None) if self.frames else ():
            self._container.mux(packet)
        self._container.close()

    def _keep_colours(self, like: av.VideoStream) -> None:
        """Say of the colours what the other video says; they are stored as they are."""
        ours, theirs = self._stream.codec_context, like.codec_context
        ours.colorspace, ours.color_primaries = theirs.colorspace, theirs.color_primaries
        ours.color_trc = theirs.color_trc
        # yuvj420p is an old name for yuv420p of full range, and is converted
        is_old = str(theirs.pix_fmt).startswith("yuvj")
        ours.color_range = ColorRange.MPEG if is_old else theirs.color_range

    def _encode(self, frame: av.VideoFrame) -> None:
        frame.pts, frame.time_base = self.frames, 1 / self._rate
        frame.pict_type = 0  # the encoder decides on key frames, not the source
        self.frames += 1
        for packet in self._stream.encode(frame):
            self.bytes += packet.size
            self._container.mux(packet)


def check_codec(codec: str) -> None:
    """Raise ValueError unless frames can be encoded so."""
    if codec not in ENCODERS:
        raise ValueError(f"expected codec {' or '.join(ENCODERS)}, got {codec!r}")
    if not has_encoder(codec):
        raise ValueError(
            f"PyAV has no {ENCODERS[codec][0]} here, which codec {codec!r} needs; it has those for "
            f"{', '.join(filter(has_encoder, ENCODERS)) or 'none'}"
        )


@cache
def has_encoder(codec: str) -> bool:
    """Whether this PyAV can encode that codec."""
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder reports its settings otherwise
    try:
        av.Codec(ENCODERS[codec][0], "w")
    except (FFmpegError, ValueError):
        return False
    return True


def default_codec() -> str:
    """AV1 where it can be encoded."""
    return "av1" if has_encoder("av1") else "h264"
