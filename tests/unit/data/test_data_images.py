"""Decoding, encoding and resizing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pizero.data import decode_image, encode_image, images, resize_image
from pizero.data.images import parse_image

OPENPI = Path(__file__).parents[2] / "data" / "fixtures" / "openpi_transforms"
FACTS = json.loads((OPENPI / "case.json").read_text())["facts"]
PICTURE = (np.stack(np.meshgrid(np.arange(40), np.arange(24)), -1).sum(-1)[..., None] * 2).astype(
    np.uint8
) + np.array([0, 50, 100], np.uint8)


def test_png_is_exact_and_jpeg_close():
    np.testing.assert_array_equal(decode_image(encode_image(PICTURE, encoding="png")), PICTURE)
    error = decode_image(encode_image(PICTURE)).astype(int) - PICTURE
    assert np.abs(error).max() <= 6


def test_pillow_decodes_within_a_few_grey_levels(monkeypatch):
    data = encode_image(PICTURE)
    fast = decode_image(data).astype(int)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.abs(fast - decode_image(data)).max() <= 5
    assert decode_image(encode_image(PICTURE)).shape == PICTURE.shape


def test_grey_and_transparent_pictures_become_rgb():
    for mode in ("L", "RGBA", "P"):
        stream = io.BytesIO()
        Image.fromarray(PICTURE).convert(mode).save(stream, "PNG")
        assert decode_image(stream.getvalue()).shape == PICTURE.shape
    stream = io.BytesIO()
    Image.fromarray(PICTURE).convert("L").save(stream, "JPEG")
    assert decode_image(stream.getvalue()).shape == PICTURE.shape


def test_pictures_are_parsed_as_openpi_parses_them():
    case = FACTS["parse_image"]
    floats = np.tile(np.array(case["from"])[:, None], (3, 1, 2))  # channels first
    parsed = parse_image(floats)
    assert parsed.shape == (4, 2, 3)
    assert parsed.dtype == np.uint8
    assert parsed[:, 0, 0].tolist() == case["float_chw_to_uint8"]
    np.testing.assert_array_equal(parse_image(floats.astype(np.float32)), parsed)
    assert parse_image(PICTURE) is PICTURE
    np.testing.assert_array_equal(parse_image(np.moveaxis(PICTURE, -1, 0)), PICTURE)
    frames = np.stack([PICTURE] * 3)  # a first axis of 3 frames is not one of channels
    np.testing.assert_array_equal(parse_image(frames), frames)
    np.testing.assert_array_equal(parse_image(np.moveaxis(frames, -1, 1)), frames)
    for wrong, message in [
        (PICTURE.astype(int), r"expected uint8 \[h w 3\], got int64 \[24, 40, 3\]"),
        (PICTURE[..., :2], r"expected uint8 \[h w 3\], got uint8 \[24, 40, 2\]"),
        (PICTURE[0], r"expected uint8 \[h w 3\], got uint8 \[40, 3\]"),
        (PICTURE.astype(float), r"floats in \[0, 1\], got 0 to"),
        (np.full((4, 4, 3), np.nan), r"floats in \[0, 1\], got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_image(wrong)


def test_resize_keeps_what_fits_and_takes_height_first():
    assert resize_image(PICTURE, (24, 40), kind="lanczos") is PICTURE
    for kind in ("lanczos", "bicubic", "bilinear", "pad"):
        assert resize_image(PICTURE, (10, 30), kind=kind).shape == (10, 30, 3)


def test_refusals():
    with pytest.raises(ValueError, match=r"pad resizes uint8 \[h w 3\], got float32"):
        resize_image(PICTURE.astype(np.float32), (48, 48), kind="pad")
    with pytest.raises(ValueError, match=r"expected a JPEG or PNG image, got 5 bytes .* b'nopic'"):
        decode_image(b"nopic")
    with pytest.raises(ValueError, match="expected a JPEG or PNG image"):
        decode_image(encode_image(PICTURE)[:40])
    with pytest.raises(ValueError, match=r"expected uint8 \[h w 3\], got float64 \[2, 2\]"):
        encode_image(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="'jpeg' or 'png', got 'gif'"):
        encode_image(PICTURE, encoding="gif")
    with pytest.raises(
        ValueError, match=r"one of lanczos, bicubic, bilinear, pad, pad_anti.* got 'area'"
    ):
        resize_image(PICTURE, (2, 2), kind="area")
