"""Images between their stored form and the policy's: decode, encode, resize.

JPEG goes through libjpeg-turbo with the fast inverse DCT, which gives the same pixels as
TensorFlow's default decoder, so policies see what Octo-style training saw. Everything else is
Pillow's.
"""

from __future__ import annotations

import io

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
RESIZE_KINDS = (*_FILTERS, "pad")


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


def resize_image(image: Array, size: tuple[int, int], *, kind: str) -> Array:
    """Resize to (height, width); an image that fits already is returned as it is.

    `lanczos`, `bicubic` and `bilinear` stretch (Octo-style data uses lanczos); `pad` keeps the
    aspect ratio and fills up with black, centred, as openpi does.
    """
    if kind not in RESIZE_KINDS:
        raise ValueError(f"expected resize to be one of {', '.join(RESIZE_KINDS)}, got {kind!r}")
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    if kind != "pad":
        return np.array(Image.fromarray(image).resize((width, height), _FILTERS[kind]))
    ratio = max(image.shape[1] / width, image.shape[0] / height)
    inner_h, inner_w = int(image.shape[0] / ratio), int(image.shape[1] / ratio)
    inner = Image.fromarray(image).resize((inner_w, inner_h), Image.Resampling.BILINEAR)
    padded = np.zeros((height, width, 3), np.uint8)
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    padded[top : top + inner_h, left : left + inner_w] = np.asarray(inner)
    return padded
