"""Images between their stored form and the policy's: decode, encode, resize.

JPEG goes through libjpeg-turbo with the fast inverse DCT, which gives the same pixels as
TensorFlow's default decoder, so policies see what Octo-style training saw. Everything else is
Pillow's.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # Pillow decodes JPEG too: slower, and a grey level apart in places
    simplejpeg = None

Array = np.ndarray  # uint8 [h w 3]

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_LINEAR = {"pad_antialiased": True, "pad_bilinear": False}  # openpi's inside the model
RESIZE_KINDS = (*_FILTERS, "pad", *_LINEAR)


def decode_image(data: bytes) -> Array:
    """uint8 [h w 3] from JPEG, PNG or whatever else Pillow reads; ValueError when it is broken."""
    try:
        if simplejpeg is not None and data[:3] == b"\xff\xd8\xff":
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True)
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a JPEG or PNG image, got {len(data)} bytes that start with {data[:8]!r}: "
            f"{error}"
        ) from error


def encode_image(image: Array, *, encoding: str = "jpeg", quality: int = 95) -> bytes:
    """JPEG (without chroma subsampling) or PNG bytes of a uint8 [h w 3] image."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"expected uint8 [h w 3], got {image.dtype} {list(image.shape)}")
    if encoding not in ("jpeg", "png"):
        raise ValueError(f"expected encoding 'jpeg' or 'png', got {encoding!r}")
    if encoding == "jpeg" and simplejpeg is not None:
        pixels = np.ascontiguousarray(image)
        return simplejpeg.encode_jpeg(pixels, quality, colorspace="RGB", colorsubsampling="444")
    stream = io.BytesIO()
    options = {"quality": quality, "subsampling": 0} if encoding == "jpeg" else {}
    Image.fromarray(image).save(stream, encoding.upper(), **options)
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

    `lanczos`, `bicubic` and `bilinear` stretch (Octo-style data uses lanczos). The others keep the
    aspect ratio and fill up with black, centred: `pad` as openpi's policies and clients do,
    `pad_antialiased` and `pad_bilinear` as its JAX and its PyTorch models do with pictures of
    another size. These two also take floats [h w 3] in [-1, 1], and then give floats.
    """
    if kind not in RESIZE_KINDS:
        raise ValueError(f"expected resize to be one of {', '.join(RESIZE_KINDS)}, got {kind!r}")
    if image.dtype != np.uint8 and kind not in _LINEAR:
        raise ValueError(f"{kind} resizes uint8 [h w 3], got {image.dtype} {list(image.shape)}")
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    if kind in _FILTERS:
        return np.array(Image.fromarray(image).resize((width, height), _FILTERS[kind]))
    ratio = max(image.shape[1] / width, image.shape[0] / height)
    inner = (int(image.shape[0] / ratio), int(image.shape[1] / ratio))
    if kind == "pad":
        shape = (inner[1], inner[0])
        content = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR))
    else:
        content = _resize_linear(image, inner, antialias=_LINEAR[kind])
    black = 0 if image.dtype == np.uint8 else -1
    padded = np.full((height, width, 3), black, image.dtype)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    padded[top : top + inner[0], left : left + inner[1]] = content
    return padded


def _resize_linear(image: np.ndarray, size: tuple[int, int], *, antialias: bool) -> np.ndarray:
    vertical = _linear_weights(image.shape[0], size[0], antialias)
    horizontal = _linear_weights(image.shape[1], size[1], antialias)
    resized = np.einsum("ih,hwc->iwc", vertical, image.astype(np.float32), optimize=True)
    resized = np.einsum("jw,iwc->ijc", horizontal, resized, optimize=True)
    if image.dtype == np.uint8:
        return np.clip(np.rint(resized), 0, 255).astype(np.uint8)
    return np.clip(resized, -1, 1).astype(image.dtype)


@lru_cache(maxsize=32)
def _linear_weights(old: int, new: int, antialias: bool) -> np.ndarray:
    """float32 [new old]: share of each old pixel in each new one; rows sum to 1."""
    step = old / new
    centers = (np.arange(new) + 0.5) * step - 0.5
    distance = np.abs(centers[:, None] - np.arange(old))
    weights = np.maximum(0, 1 - distance / (max(step, 1.0) if antialias else 1.0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
