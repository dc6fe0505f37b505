"""Decoding, encoding and resizing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from pizero.data import decode_image, encode_image, images, resize_image

OPENPI = Path(__file__).parents[2] / "data" / "fixtures" / "openpi_transforms"
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


@pytest.mark.parametrize("name", ["200x120", "37x91", "30x20"])
def test_padding_resize_is_openpis(name):
    arrays = load_file(OPENPI / "arrays.safetensors")
    size = next(k for k in arrays if k.startswith(f"resize.{name}.client_"))
    side = int(size.rpartition("_")[2])
    got = resize_image(arrays[f"resize.{name}.in"], (side, side), kind="pad").astype(int)
    assert np.abs(got - arrays[size]).max() <= 1


def test_resize_keeps_what_fits_and_takes_height_first():
    assert resize_image(PICTURE, (24, 40), kind="lanczos") is PICTURE
    for kind in ("lanczos", "bicubic", "bilinear", "pad"):
        assert resize_image(PICTURE, (10, 30), kind=kind).shape == (10, 30, 3)


def test_refusals():
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
