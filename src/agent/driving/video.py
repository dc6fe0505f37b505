"""Episodes as small H.264 files for any browser, with the instruction and the outcome on them.

Needs PyAV (the `report` extra).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 10
BACKGROUND = (24, 27, 33)
TEXT = (236, 239, 244)
FAINT = (150, 158, 170)
SUCCESS = (70, 190, 120)
FAILURE = (226, 108, 96)
NEUTRAL = (120, 128, 140)
HOLD_SECONDS = 0.8


def write_video(
    path: Path,
    *,
    frames: Sequence[np.ndarray],
    instruction: str,
    detail: str,
    reached: Sequence[bool],
    missed: bool,
    fps: float,
) -> None:
    """Writes `frames` (uint8 [h w 3]) as an mp4 with a caption, and beside it its last as a .jpg.

    `reached[i]` says whether the goal has been reached by frame i; the rim is green from there on,
    and red on the held last frame of an episode that `missed`.
    """
    if not frames:
        raise ValueError(f"no frames to write to {path}")
    if len(reached) != len(frames):
        raise ValueError(f"{len(frames)} frames but {len(reached)} outcomes for {path}")
    rows = list(frames)
    caption = _caption(rows[0].shape[1] + 2 * MARGIN, instruction, detail)
    held = max(1, round(HOLD_SECONDS * fps))
    colours = [SUCCESS if r else NEUTRAL for r in reached]
    colours += [FAILURE if missed else colours[-1]] * held
    rows += [rows[-1]] * held

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pictures = (_framed(row, colour, caption) for row, colour in zip(rows, colours, strict=True))
    _encode(temporary, pictures, fps=fps, crf=25)
    last = Image.fromarray(_framed(rows[-1], colours[-1], caption))
    last.save(path.with_suffix(".jpg"), quality=80)
    os.replace(temporary, path)


def film(frames: Iterable[np.ndarray], *, fps: float, crf: int = 28) -> bytes:
    """`frames` (uint8 [h w 3], as they are) as the bytes of an mp4."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        _encode(path, (_even(frame) for frame in frames), fps=fps, crf=crf)
        return path.read_bytes()


def _encode(path: Path, pictures: Iterable[np.ndarray], *, fps: float, crf: int) -> None:
    """H.264 of pictures with even sides."""
    av = _pyav()
    options = {"movflags": "faststart"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = None
        for picture in pictures:
            if stream is None:
                stream = container.add_stream("libx264", rate=max(1, round(fps)))
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": str(crf), "preset": "veryfast"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if stream is None:
            raise ValueError("expected at least one frame, got none")
        container.mux(stream.encode())


def _framed(row: np.ndarray, colour: tuple[int, int, int], caption: np.ndarray) -> np.ndarray:
    """Caption above, pictures below inside a coloured rim; both sizes even, as yuv420 needs."""
    height, width = row.shape[:2]
    canvas = np.empty((caption.shape[0] + height + MARGIN, width + 2 * MARGIN, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    canvas[: caption.shape[0]] = caption
    top, rim = caption.shape[0], 3
    canvas[top - rim : top + height + rim, MARGIN - rim : MARGIN + width + rim] = colour
    canvas[top : top + height, MARGIN : MARGIN + width] = row
    return _even(canvas)


def _even(picture: np.ndarray) -> np.ndarray:
    """Both sides even, as yuv420 needs."""
    odd = [(0, side % 2) for side in picture.shape[:2]]
    return np.pad(picture, (*odd, (0, 0)), mode="edge")


def _caption(width: int, instruction: str, detail: str) -> np.ndarray:
    large, small = _font(17), _font(12)
    lines = _wrapped(
        f"\N{LEFT DOUBLE QUOTATION MARK}{instruction}\N{RIGHT DOUBLE QUOTATION MARK}",
        large,
        width - 2 * MARGIN,
    )
    height = 8 + 22 * len(lines) + 18 + 6
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((MARGIN, 6 + 22 * i), line, font=large, fill=TEXT)
    draw.text((MARGIN, 8 + 22 * len(lines)), detail, font=small, fill=FAINT)
    return np.asarray(image)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType"
    return font


def scaled(picture: np.ndarray, *, height: int) -> np.ndarray:
    """A frame uint8 [h w 3] brought to `height`, smoothly."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"a frame must be uint8 [height width 3], got {picture.dtype} {list(picture.shape)}"
        )
    h, w = picture.shape[:2]
    if h == height:
        return picture
    size = (max(1, round(w * height / h)), height)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def _pyav():
    try:
        import av
    except ImportError as error:
        raise ValueError("writing videos needs PyAV: pip install 'pizero[report]'") from error
    return av
