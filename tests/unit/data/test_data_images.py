"""Decoding, encoding and resizing.

The vectors under tests/data/images were computed with TensorFlow 2.21.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pizero.data import decode_image, encode_image, images, resize_image
from pizero.data.images import parse_image, resize_depth

OPENPI = Path(__file__).parents[2] / "data" / "fixtures" / "openpi_transforms"
TENSORFLOW = Path(__file__).parents[2] / "data" / "images" / "tensorflow.npz"
FACTS = json.loads((OPENPI / "case.json").read_text())["facts"]
PICTURE = (np.stack(np.meshgrid(np.arange(40), np.arange(24)), -1).sum(-1)[..., None] * 2).astype(
    np.uint8
) + np.array([0, 50, 100], np.uint8)


def test_png_is_exact_and_jpeg_close():
    np.testing.assert_array_equal(decode_image(encode_image(PICTURE, encoding="png")), PICTURE)
    error = decode_image(encode_image(PICTURE)).astype(int) - PICTURE
    assert np.abs(error).max() <= 6


def test_decoder_and_lanczos_equal_tensorflow():
    with np.load(TENSORFLOW) as stored:
        picture = decode_image(stored["jpeg"].tobytes())
        np.testing.assert_array_equal(picture, stored["decoded"])
        sizes = [key for key in stored if key.startswith("lanczos")]
        assert len(sizes) == 3
        for key in sizes:
            height, width = map(int, key.split("_")[1:])
            resized = resize_image(picture, (height, width), kind="lanczos")
            wrong = np.abs(resized.astype(int) - stored[key])
            assert wrong.max() <= 1  # halves may round either way
            assert (wrong > 0).mean() < 0.001
        depth = resize_depth(stored["depth"], (20, 20))
        assert np.abs(depth.astype(int) - stored["depth_20_20"]).max() <= 1
        assert depth.dtype == np.uint16
        assert resize_depth(depth, (20, 20)) is depth


@pytest.mark.parametrize(
    ("old", "new", "limit"),
    [((256, 256), (224, 224), 1), ((480, 640), (224, 224), 1), ((64, 64), (224, 224), 2)],
)
def test_bicubic_is_pillows(old, new, limit):
    y, x = np.mgrid[: old[0], : old[1]]
    waves = [
        128 + 90 * np.sin(x / 13),
        128 + 90 * np.cos((x + y) / 7),
        (x // 16 + y // 9) % 2 * 200,
    ]
    noise = np.random.default_rng(0).normal(0, 8, (*old, 3))
    picture = np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)
    expected = np.array(Image.fromarray(picture).resize(new[::-1], Image.Resampling.BICUBIC))
    wrong = np.abs(resize_image(picture, new, kind="bicubic").astype(int) - expected)
    assert wrong.max() <= limit
    assert wrong.mean() < 0.02
    upside_down = np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.shape)[::-1]
    assert resize_image(upside_down, new, kind="bicubic").shape == (*new, 3)


def test_resampling_equals_whole_products_of_weights():
    """Blocks of rows and their windows against the definition, in float64."""
    picture = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    for size in [(16, 17), (15, 100), (1, 1), (61, 53)]:
        rows = images._weights(37, size[0], "lanczos", True)
        columns = images._weights(53, size[1], "lanczos", True)
        exact = np.einsum("ih,jw,hwc->ijc", rows, columns, picture, optimize=True)
        resized = resize_image(picture, size, kind="lanczos")
        assert np.abs(resized - np.clip(exact, 0, 255)).max() <= 0.5001


def test_damaged_pictures_are_refused(monkeypatch):
    jpeg, png = encode_image(PICTURE), encode_image(PICTURE, encoding="png")
    for _ in range(2):
        for data in (jpeg, png):
            for size in (len(data) - 1, len(data) - 20, len(data) // 2, 30, 3):
                with pytest.raises(ValueError, match=rf"JPEG or PNG image, got {size} bytes"):
                    decode_image(data[:size])
        monkeypatch.setattr(images, "simplejpeg", None)
    for position in range(40, len(png) - 20, 7):
        damaged = bytearray(png)
        damaged[position] ^= 0x10
        with pytest.raises(ValueError, match="expected a JPEG or PNG image"):
            decode_image(bytes(damaged))


def test_pictures_that_claim_to_be_huge_are_refused():
    def png(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + header
        start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk
        return start + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT5\xaf\x06\x1e"

    jpeg = bytearray(encode_image(PICTURE))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 60000, 60000)
    for data in (bytes(jpeg), png(9000, 9000)):
        with pytest.raises(ValueError, match=r"the header claims \d+ x \d+ pixels, at most 8192"):
            decode_image(data)
    with pytest.raises(ValueError, match=r"expected a JPEG or PNG image, .* decompression bomb"):
        decode_image(png(60000, 60000))


def test_other_formats_are_refused():
    stream = io.BytesIO()
    Image.fromarray(PICTURE).save(stream, "GIF")
    with pytest.raises(ValueError, match=r"expected a JPEG or PNG image, got .* b'GIF8"):
        decode_image(stream.getvalue())


def test_colours_are_kept_sharp_unless_asked_otherwise(monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for _ in range(2):
        sharp, small = (encode_image(picture, subsampling=s) for s in ("444", "420"))
        assert len(small) < len(sharp)
        errors = [np.abs(decode_image(d).astype(int) - picture).mean() for d in (sharp, small)]
        assert errors[0] < errors[1] / 3
        monkeypatch.setattr(images, "simplejpeg", None)
    with pytest.raises(ValueError, match="'444' or '420', got '411'"):
        encode_image(picture, subsampling="411")


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
