"""TFRecord framing: checksums against known values, errors that name file and offset."""

from __future__ import annotations

import pickle
import struct

import pytest

from pizero.data.checksum import crc32c
from pizero.data.rlds.tfrecord import (
    CorruptRecordError,
    FileReader,
    frame_record,
    masked_crc,
    scan_records,
    verify_record,
)


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, B.4
        (b"", 0x00000000),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc_of_published_vectors(data, expected):
    assert crc32c(data) == expected


def test_masked_crc_is_rotated_and_offset():
    crc = crc32c(b"123456789")
    assert masked_crc(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_records_are_found_where_they_lie():
    payloads = [b"one", b"", b"x" * 5000]
    data = b"".join(map(frame_record, payloads))
    spans = list(scan_records(memoryview(data), name="f"))
    for start, size in spans:
        verify_record(memoryview(data), start, size, name="f")
    assert [data[start : start + size] for start, size in spans] == payloads


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (5, r"file\.rec: truncated header at offset 0: expected 12 bytes, got 5"),
        (14, r"file\.rec: truncated record at offset 0: expected 104 bytes .* got 2"),
        (115, r"file\.rec: truncated record at offset 0: expected 104 bytes .* got 103"),
        (130, r"file\.rec: truncated record at offset 116: .* got 2"),
    ],
)
def test_truncation_names_file_offset_and_sizes(cut, message):
    data = frame_record(b"a" * 100) + frame_record(b"b" * 100)
    with pytest.raises(CorruptRecordError, match=message):
        list(scan_records(memoryview(data[:cut]), name="file.rec"))


def test_wrong_checksums_are_refused():
    data = bytearray(frame_record(b"a" * 100))
    data[50] ^= 1
    assert list(scan_records(memoryview(data), name="f")) == [(12, 100)]  # payload unchecked
    with pytest.raises(CorruptRecordError, match=r"payload at offset 12 \(100 bytes\)"):
        verify_record(memoryview(data), 12, 100, name="f")
    data[0] ^= 1
    with pytest.raises(CorruptRecordError, match="length at offset 0 does not match"):
        list(scan_records(memoryview(data), name="f"))


def test_header_layout():
    record = frame_record(b"abc")
    assert struct.unpack("<Q", record[:8]) == (3,)
    assert len(record) == 8 + 4 + 3 + 4


def test_reader_keeps_few_files_open_and_reports_short_files(tmp_path):
    paths = []
    for i in range(5):
        path = tmp_path / f"{i}"
        path.write_bytes(bytes([i]) * 10)
        paths.append(str(path))
    reader = FileReader(limit=2)
    for _ in range(2):
        assert [reader.read(p, 3, 2) for p in paths] == [bytes([i]) * 2 for i in range(5)]
        assert len(reader._descriptors) == 2
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(paths[4], 0, 1) == b"\x04"
    with pytest.raises(CorruptRecordError, match="expected 9 bytes at offset 5, got 5"):
        reader.read(paths[0], 5, 9)
    reader.close()
    copy.close()
