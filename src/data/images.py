"""Images between their stored form and the policy's: decode, encode, resize.

JPEG goes through libjpeg-turbo with the fast inverse DCT, which gives the same pixels as
TensorFlow's default decoder, and `lanczos` is its lanczos3, so policies see what Octo-style
training saw. What is damaged is refused, never patched up.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

try:
    import simplejpeg
except ImportError:  # Pillow decodes JPEG too: slower, and a grey level apart in places
    simplejpeg = None

Array = np.ndarray  # uint8 [h w 3]

MAX_PIXELS = 2**26  # 8192 x 8192; a damaged header can claim 65535 x 65535, which is 12 GiB
_FORMATS = ("JPEG", "PNG")
_PNG_END = b"IEND\xaeB\x60\x82"  # Pillow does without it once it has all rows
# Pillow calls a damaged PNG a SyntaxError, and has a limit of its own above ours.
_DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_PADDED = {"pad_antialiased": True, "pad_bilinear": False}  # openpi's inside the model
RESIZE_KINDS = ("lanczos", "bicubic", "bilinear", "pad", *_PADDED)
_SUBSAMPLING = {"444": 0, "420": 2}  # as Pillow numbers them
_BLOCK = 16  # rows of a product in _resample


def decode_image(data: bytes) -> Array:
    """uint8 [h w 3] from JPEG or PNG; ValueError when it is cut off, damaged or larger than 64 MP.

    A JPEG whose coefficients were changed into others is a JPEG still; only the checksum of its
    record tells, which is compared when the index is built.
    """
    try:
        if simplejpeg is not None and data[:3] == b"\xff\xd8\xff":
            _expect_size(*map(int, simplejpeg.decode_jpeg_header(data)[:2]))
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, strict=True)
        with _opened(data) as image:
            return np.array(image.convert("RGB"))
    except _DAMAGED as error:
        raise _not_a_picture(data, error) from error


def decode_stored(data: bytes) -> np.ndarray:
    """[h w c] as stored, where decode_image would make colours of it: grey, with alpha or uint16.

    ValueError as there.
    """
    try:
        with _opened(data) as image:
            pixels = np.array(image)
    except _DAMAGED as error:
        raise _not_a_picture(data, error) from error
    return pixels.reshape(*pixels.shape[:2], -1)


def encode_image(
    image: Array, *, encoding: str = "jpeg", quality: int = 95, subsampling: str = "444"
) -> bytes:
    """JPEG or PNG bytes of a uint8 [h w 3] image.

    `subsampling` 444 keeps the colours of a JPEG sharp; 420 is what tfds writes, a third smaller.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"expected uint8 [h w 3], got {image.dtype} {list(image.shape)}")
    if encoding not in ("jpeg", "png"):
        raise ValueError(f"expected encoding 'jpeg' or 'png', got {encoding!r}")
    if subsampling not in _SUBSAMPLING:
        raise ValueError(f"expected subsampling '444' or '420', got {subsampling!r}")
    if encoding == "jpeg" and simplejpeg is not None:
        pixels = np.ascontiguousarray(image)
        return simplejpeg.encode_jpeg(
            pixels, quality, colorspace="RGB", colorsubsampling=subsampling
        )
    stream = io.BytesIO()
    options = {"quality": quality, "subsampling": _SUBSAMPLING[subsampling]}
    Image.fromarray(image).save(stream, encoding.upper(), **(options if encoding == "jpeg" else {}))
    return stream.getvalue()


def parse_image(image: Array) -> Array:
    """uint8 [... h w 3] from what clients send; openpi's rule.

    A first axis of 3 (before it: frames) means channels first. Floats count from 0 to 1 and are
    truncated to 256 levels; other floats are refused, where openpi lets them wrap round.
    """
    image = np.asarray(image)
    if image.ndim not in (3, 4) or 3 not in (image.shape[-3], image.shape[-1]):
        raise ValueError(f"expected uint8 [h w 3], got {image.dtype} {list(image.shape)}")
    if np.issubdtype(image.dtype, np.floating):
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"expected pictures of floats in [0, 1], got {image.min():g} to {image.max():g}"
            )
        image = (255 * image).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"expected uint8 [h w 3], got {image.dtype} {list(image.shape)}")
    return np.moveaxis(image, -3, -1) if image.shape[-3] == 3 else image


def resize_image(image: np.ndarray, size: tuple[int, int], *, kind: str) -> np.ndarray:
    """Resize to (height, width); an image that fits already is returned as it is.

    These stretch: `lanczos` as TensorFlow's lanczos3 with antialiasing, on which Octo-style
    policies were trained; `bicubic` within two grey levels of Pillow's and the quickest; `bilinear`
    Pillow's. The others keep the aspect ratio and fill up with black, centred: `pad` as openpi's
    policies and clients do, `pad_antialiased` and `pad_bilinear` as its JAX and its PyTorch models
    do with pictures of another size. These two also take floats [h w 3] in [-1, 1], and then give
    floats.
    """
    if kind not in RESIZE_KINDS:
        raise ValueError(f"expected resize to be one of {', '.join(RESIZE_KINDS)}, got {kind!r}")
    if image.dtype != np.uint8 and kind not in _PADDED:
        raise ValueError(f"{kind} resizes uint8 [h w 3], got {image.dtype} {list(image.shape)}")
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    if kind == "lanczos":
        return _to_pixels(_resample(image, size, kernel="lanczos", antialias=True))
    if kind == "bicubic":
        return _resize_bicubic(image, size)
    if kind == "bilinear":
        return _resize_bilinear(image, size)
    ratio = max(image.shape[1] / width, image.shape[0] / height)
    inner = (int(image.shape[0] / ratio), int(image.shape[1] / ratio))
    if kind == "pad":
        content = _resize_bilinear(image, inner)
    else:
        content = _resample(image, inner, kernel="linear", antialias=_PADDED[kind])
        is_bytes = image.dtype == np.uint8
        content = _to_pixels(content) if is_bytes else content.clamp_(-1, 1).numpy()
    black = 0 if image.dtype == np.uint8 else -1
    padded = np.full((height, width, 3), black, image.dtype)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    padded[top : top + inner[0], left : left + inner[1]] = content
    return padded


def resize_depth(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Numbers [h w c] stretched to (height, width): bilinear with antialiasing, as dlimp has it.

    Of integers the fraction is dropped.
    """
    if image.shape[:2] == tuple(size):
        return image
    return _resample(image, size, kernel="linear", antialias=True).numpy().astype(image.dtype)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _expect_size(image.height, image.width)
        if image.format == "PNG" and _PNG_END not in data[-16:]:
            raise ValueError("it is cut off before its end mark")
        yield image


def _not_a_picture(data: bytes, error: Exception) -> ValueError:
    return ValueError(
        f"expected a JPEG or PNG image, got {len(data)} bytes that start with {data[:8]!r}: {error}"
    )


def _expect_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"the header claims {height} x {width} pixels, at most 8192 x 8192 are")


def _resize_bilinear(image: Array, size: tuple[int, int]) -> Array:
    height, width = size
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _resize_bicubic(image: Array, size: tuple[int, int]) -> Array:
    pixels = torch.from_numpy(np.require(image, requirements=("C", "W")))
    pixels = pixels.permute(2, 0, 1)[None]  # channels last, where torch is quick
    resized = F.interpolate(pixels, size, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _resample(
    image: np.ndarray, size: tuple[int, int], *, kernel: str, antialias: bool
) -> torch.Tensor:
    """float32 [h w c], separably: along the height, then along the width."""
    height, width, channels = image.shape
    vertical = _bands(height, size[0], kernel, antialias)
    horizontal = _bands(width, size[1], kernel, antialias)
    pixels = torch.from_numpy(image.astype(np.float32, order="C")).view(height, -1)
    pixels = _combine_rows(pixels, size[0], *vertical).view(size[0], width, channels)
    pixels = pixels.transpose(0, 1).reshape(width, -1)
    pixels = _combine_rows(pixels, size[1], *horizontal).view(size[1], size[0], channels)
    return pixels.transpose(0, 1)


def _to_pixels(values: torch.Tensor) -> Array:
    return values.round_().clamp_(0, 255).numpy().astype(np.uint8)


def _combine_rows(
    pixels: torch.Tensor, new: int, windows: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """float32 [old n] to [new n]: each row a weighted sum of the few old ones below its kernel.

    A block of neighbouring rows draws on one window of old ones: a handful of small dense products
    in place of one that is mostly zeros.
    """
    return torch.bmm(weights, pixels[windows]).flatten(0, 1)[:new]


@lru_cache(maxsize=32)
def _bands(old: int, new: int, kernel: str, antialias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of each window [blocks window] and their weights [blocks _BLOCK window]."""
    weights = _weights(old, new, kernel, antialias)
    blocks = [weights[i : i + _BLOCK] for i in range(0, new, _BLOCK)]
    used = [np.flatnonzero(block.any(0)) for block in blocks]
    window = max(int(columns[-1] - columns[0]) + 1 for columns in used)
    starts = [min(int(columns[0]), old - window) for columns in used]
    bands = np.zeros((len(blocks), _BLOCK, window), np.float32)
    for band, block, start in zip(bands, blocks, starts, strict=True):
        band[: len(block)] = block[:, start : start + window]
    return torch.tensor(starts)[:, None] + torch.arange(window), torch.from_numpy(bands)


def _weights(old: int, new: int, kernel: str, antialias: bool) -> np.ndarray:
    """[new old]: share of each old pixel in each new one; rows sum to 1."""
    step = old / new
    centers = (np.arange(new) + 0.5) * step - 0.5
    x = np.abs(centers[:, None] - np.arange(old)) / (max(step, 1.0) if antialias else 1.0)
    if kernel == "lanczos":
        weights = np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)
    else:
        weights = np.maximum(0, 1 - x)
    return weights / weights.sum(1, keepdims=True)
