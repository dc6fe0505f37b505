"""Videos: any frame at random is the one that decoding from the start gives, whatever the codec."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pizero.data.lerobot import video
from pizero.data.lerobot.encode import VideoEncoder, check_codec
from pizero.data.lerobot.reencode import reencode
from pizero.data.lerobot.video import BACKENDS, VideoReader, num_open, probe_video

SIZE = 32
KINDS = {
    "av1": ("libsvtav1", 2, {"crf": "30", "preset": "12"}, {}),
    "long_gop": ("libx264", 60, {"bf": "0", "sc_threshold": "0"}, {}),
    "reordered": ("libx264", 12, {"bf": "3"}, {}),
    "open_gop": ("libx265", 12, {"x265-params": "log-level=none:open-gop=1:bframes=4"}, {}),
    "begins_late": ("libx264", 10, {}, {"first": 15}),
    "odd_rate": ("libx264", 10, {"bf": "2"}, {"rate": Fraction(30000, 1001)}),
}


def picture(number: int) -> np.ndarray:
    image = np.full((SIZE, SIZE, 3), 3 * number % 200, np.uint8)
    image[number % 24 : number % 24 + 8, 8:16] = (250, 200, 90)
    return image


def write(
    path: Path,
    codec: str,
    gop: int,
    options: dict[str, str],
    *,
    frames: int = 64,
    rate: Fraction | int = 30,
    first: int = 0,
    times: list[int] | None = None,
) -> Path:
    """A video that our own encoder had no part in."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": str(gop)} | options)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = (
                first + (i if times is None else times[i]),
                1 / Fraction(rate),
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    os.environ.setdefault("SVT_LOG", "1")
    return {
        name: write(folder / f"{name}.mp4", codec, gop, options, **more)
        for name, (codec, gop, options, more) in KINDS.items()
    }


@pytest.fixture(params=BACKENDS)
def reader(request) -> VideoReader:
    try:
        return VideoReader(backend=request.param)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", KINDS)
def test_any_frame_is_that_of_a_pass(videos, reader, kind):
    expected = decode_all(videos[kind])
    rng = np.random.default_rng(0)
    for _ in range(12):
        frames = rng.integers(0, len(expected), rng.integers(1, 5))  # in any order, some twice
        np.testing.assert_array_equal(reader.read(str(videos[kind]), frames), expected[frames])
    np.testing.assert_array_equal(reader.read(str(videos[kind]), range(64)), expected)
    assert np.abs(expected[5].astype(int) - picture(5)).mean() < 12


def test_what_the_container_says(videos):
    facts = probe_video(videos["long_gop"])
    assert (facts.frames, facts.fps, facts.codec, facts.gop) == (64, 30, "h264", 60)
    assert (facts.height, facts.width, facts.pix_fmt) == (SIZE, SIZE, "yuv420p")
    assert probe_video(videos["av1"]).gop == 2
    assert probe_video(videos["odd_rate"]).fps == pytest.approx(29.97, abs=1e-3)


def test_as_many_decoders_as_allowed(videos, monkeypatch):
    monkeypatch.setattr(video, "OPEN_DECODERS", 2)
    monkeypatch.setattr(video, "_open_decoders", video._OpenDecoders())
    readers = [VideoReader(backend="pyav"), VideoReader(backend="pyav", tolerance_s=1e-3)]
    expected = {name: decode_all(path)[7] for name, path in videos.items()}
    for name in [*videos, *reversed(videos)] * 2:
        for reader in readers:
            np.testing.assert_array_equal(reader.read(str(videos[name]), [7])[0], expected[name])
            assert 1 <= num_open() <= 2
    assert num_open() == 2


def test_a_fork_begins_without_decoders(videos, reader):
    path = str(videos["reordered"])
    expected = reader.read(path, [9])[0]
    before = num_open()
    assert before
    read, write = os.pipe()
    if not (child := os.fork()):
        is_empty = num_open() == 0
        is_equal = np.array_equal(reader.read(path, [9])[0], expected)
        os.write(write, b"%d%d" % (is_empty, is_equal))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 2) == b"11"
    assert num_open() == before
    np.testing.assert_array_equal(reader.read(path, [9])[0], expected)


def test_a_file_that_was_replaced_is_read_anew(videos, reader, tmp_path):
    path = tmp_path / "x.mp4"
    for kind in ("av1", "reordered"):
        path.write_bytes(videos[kind].read_bytes())
        np.testing.assert_array_equal(reader.read(str(path), [3])[0], decode_all(videos[kind])[3])
    path.unlink()
    with pytest.raises(ValueError, match=r"x\.mp4: cannot be read: No such file"):
        reader.read(str(path), [3])


def test_threads_take_turns(videos, reader):
    path = str(videos["reordered"])
    expected = decode_all(videos["reordered"])
    frames = np.random.default_rng(0).integers(0, 64, 200).tolist()
    with ThreadPoolExecutor(4) as pool:
        images = pool.map(lambda i: reader.read(path, [i])[0], frames)
        for frame, image in zip(frames, images, strict=True):
            np.testing.assert_array_equal(image, expected[frame])


def test_frames_that_are_not_there(videos, reader):
    with pytest.raises(ValueError, match=r"av1\.mp4: expected frame numbers in 0\.\.63, got 64"):
        reader.read(str(videos["av1"]), [64])


def test_a_rate_that_varies_is_refused(tmp_path):
    """By position one would get frames, but not those of the times that the rows have."""
    times = [*range(10), *range(12, 22)]
    path = write(tmp_path / "gap.mp4", "libx264", 5, {"bf": "0"}, frames=20, times=times)
    assert probe_video(path).fps == pytest.approx(20 / 22 * 30)  # so it is not that of its set
    with pytest.raises(ValueError, match=r"gap\.mp4, frame 15: frame 15 is shown at .* expected"):
        VideoReader(backend="pyav").read(str(path), [15])


def test_damage_is_told_with_file_and_frame(videos, reader, tmp_path):
    data = videos["av1"].read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4: not a whole video"):
        reader.read(str(cut), [3])
    with pytest.raises(ValueError, match=r"cut\.mp4: not a whole video"):
        probe_video(cut)
    path = _without_frame(videos["av1"], 30, tmp_path)
    expected = decode_all(videos["av1"])
    np.testing.assert_array_equal(reader.read(str(path), [2])[0], expected[2])
    with pytest.raises(
        ValueError, match=r"hurt\.mp4, frames 24\.\.35: (cannot be decoded|frame 30)"
    ):
        reader.read(str(path), range(24, 36))
    np.testing.assert_array_equal(reader.read(str(path), [2])[0], expected[2])  # it recovers
    path = _without_frame(videos["reordered"], 30, tmp_path)
    with pytest.raises(ValueError, match=r"hurt\.mp4"):
        reader.read(str(path), range(64))


def _without_frame(path: Path, number: int, folder: Path) -> Path:
    """A copy in which the bytes of one frame are zero."""
    with av.open(str(path)) as container:
        entry = list(container.streams.video[0].index_entries)[number]
        start, size = entry.pos, entry.size  # the entry goes with the container
    data = path.read_bytes()
    hurt = folder / "hurt.mp4"
    hurt.write_bytes(data[:start] + bytes(size) + data[start + size :])
    return hurt


def test_no_video_at_all(videos, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.mp4: not a whole video"):
        probe_video(tmp_path / "empty.mp4")
    strange = tmp_path / "strange.mp4"
    strange.write_bytes(videos["long_gop"].read_bytes().replace(b"avc1", b"zzz9"))
    with pytest.raises(ValueError, match=r"strange\.mp4: .* a codec that nothing here decodes"):
        probe_video(strange)
    with pytest.raises(ValueError, match="video backend torchcodec or pyav, got 'cv2'"):
        VideoReader(backend="cv2")


@pytest.mark.parametrize("codec", ["av1", "h264"])
def test_our_encoder_is_quick_to_read(tmp_path, codec):
    encoder = VideoEncoder(tmp_path / "x.mp4", fps=5, height=SIZE, width=SIZE, codec=codec)
    for i in range(9):
        encoder.add(picture(i))
    encoder.close()
    facts = probe_video(tmp_path / "x.mp4")
    assert (facts.frames, facts.fps, facts.codec, facts.gop) == (9, 5, codec, 2)
    assert np.abs(decode_all(tmp_path / "x.mp4")[4].astype(int) - picture(4)).mean() < 12


def test_what_cannot_be_encoded(tmp_path):
    with pytest.raises(ValueError, match=r"even height and width, .* got 31 x 32"):
        VideoEncoder(tmp_path / "x.mp4", fps=5, height=31, width=32)
    with pytest.raises(ValueError, match="expected codec av1 or h264, got 'vp8'"):
        check_codec("vp8")


@pytest.mark.parametrize("codec", [None, "av1"])
def test_encoding_anew_keeps_every_frame(videos, tmp_path, codec):
    path = tmp_path / "long.mp4"
    path.write_bytes(videos["long_gop"].read_bytes())
    path.chmod(0o640)
    before = decode_all(path)
    assert reencode(path, codec=codec)
    facts = probe_video(path)
    assert (facts.frames, facts.fps, facts.gop) == (64, 30, 2)
    assert facts.codec == (codec or "h264")
    assert path.stat().st_mode & 0o777 == 0o640
    after = decode_all(path)
    nearest = [np.abs(before.astype(int) - image).mean((1, 2, 3)).argmin() for image in after]
    assert nearest == list(range(64))
    stamp = path.stat().st_mtime_ns
    assert not reencode(path, codec=codec)
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(("matrix", "full"), [(1, False), (5, True)])
def test_encoding_anew_keeps_colours(tmp_path, matrix, full):
    """Other matrices and ranges of colour are said in the new file as in the old one."""
    path = tmp_path / "colours.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5", "g": "30"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1 + full
        for i in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(40 + i), "rgb24")))
        container.mux(stream.encode(None))
    before = decode_all(path)
    assert reencode(path, codec="av1", crf=5)
    assert np.abs(decode_all(path).astype(int) - before).mean() < 2


def test_a_damaged_video_stays_as_it_is(videos, tmp_path):
    path = _without_frame(videos["long_gop"], 20, tmp_path)
    data = path.read_bytes()
    with pytest.raises(ValueError, match=r"hurt\.mp4"):
        reencode(path, codec="av1")
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["hurt.mp4"]
