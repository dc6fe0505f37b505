"""TFRecord files without TensorFlow: framing, checksums, and reads at a known offset.

A record is `length (u64) | masked CRC of length (u32) | payload | masked CRC of payload (u32)`,
all little endian. The index finds each payload once with `scan_records`; afterwards `FileReader`
fetches any span with one positioned read, so several processes share files without a cursor.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

try:
    import google_crc32c
except ImportError:
    google_crc32c = None

HEADER_BYTES = 12  # length and its checksum
FOOTER_BYTES = 4  # checksum of the payload


class CorruptRecordError(ValueError):
    """A TFRecord file that ends early or whose checksum does not match."""


def crc32c(data: bytes | memoryview) -> int:
    """The Castagnoli CRC of `data`."""
    if google_crc32c is None:
        return crc32c_numpy(data)
    crc = 0
    for start in range(0, len(data), _PIECE):  # the library wants bytes; copies stay in the cache
        crc = google_crc32c.extend(crc, bytes(data[start : start + _PIECE]))
    return crc


def crc32c_numpy(data: bytes | memoryview) -> int:
    """The same where the library is missing, at a fortieth of its speed.

    A CRC is linear, so long inputs are cut into lanes that advance together in numpy; neighbouring
    lanes are then merged by a table that stands for "advance over as many zero bytes".
    """
    if len(data) < 4 * _LANE:
        crc = 0xFFFFFFFF
        for byte in bytes(data):
            crc = _TABLE_LIST[(crc ^ byte) & 0xFF] ^ (crc >> 8)
        return crc ^ 0xFFFFFFFF
    padding = -len(data) % _LANE
    padded = np.zeros(padding + len(data), np.uint8)  # leading zeros leave a zero CRC unchanged
    padded[padding:] = np.frombuffer(data, np.uint8)
    padded[padding : padding + 4] ^= 0xFF  # the initial value of all ones
    columns = np.ascontiguousarray(padded.reshape(-1, _LANE).T)
    crc = np.zeros(columns.shape[1], np.uint32)
    for column in columns:
        crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    level = 0
    while len(crc) > 1:
        if len(crc) % 2:
            crc = np.concatenate([np.zeros(1, np.uint32), crc])
        crc = _advance(crc[0::2], _advance_table(level)) ^ crc[1::2]
        level += 1
    return int(crc[0]) ^ 0xFFFFFFFF


def masked_crc(data: bytes | memoryview) -> int:
    """The CRC as TFRecord stores it: rotated and offset, so that a CRC of a CRC is harmless."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame_record(payload: bytes) -> bytes:
    """`payload` with the header and footer of a TFRecord."""
    length = struct.pack("<Q", len(payload))
    return b"".join(
        [
            length,
            struct.pack("<I", masked_crc(length)),
            payload,
            struct.pack("<I", masked_crc(payload)),
        ]
    )


def scan_records(buffer: memoryview, *, name: str) -> Iterator[tuple[int, int]]:
    """Yield the offset and length of each payload in a whole file, touching headers only.

    Raises CorruptRecordError naming the file and offset: behind a damaged header nothing is found.
    """
    position = 0
    while position < len(buffer):
        start = position + HEADER_BYTES
        if start > len(buffer):
            raise CorruptRecordError(
                f"{name}: truncated header at offset {position}: expected {HEADER_BYTES} bytes, "
                f"got {len(buffer) - position}"
            )
        length, length_crc = struct.unpack("<QI", buffer[position:start])
        if masked_crc(buffer[position : position + 8]) != length_crc:
            raise CorruptRecordError(
                f"{name}: the record length at offset {position} does not match its checksum"
            )
        end = start + length
        if end + FOOTER_BYTES > len(buffer):
            raise CorruptRecordError(
                f"{name}: truncated record at offset {position}: expected {length + FOOTER_BYTES} "
                f"bytes after the header, got {len(buffer) - start}"
            )
        yield start, length
        position = end + FOOTER_BYTES


def verify_record(buffer: memoryview, offset: int, length: int, *, name: str) -> None:
    """Compare a payload with its checksum; CorruptRecordError names the file and offset."""
    end = offset + length
    (expected,) = struct.unpack("<I", buffer[end : end + FOOTER_BYTES])
    if masked_crc(buffer[offset:end]) != expected:
        raise CorruptRecordError(
            f"{name}: the payload at offset {offset} ({length} bytes) does not match its checksum"
        )


class FileReader:
    """Positioned reads over many files, keeping at most `limit` of them open.

    Pickles as an empty reader; a forked copy may go on using the inherited descriptors, because a
    positioned read moves no shared cursor.
    """

    def __init__(self, *, limit: int = 256) -> None:
        self.limit = limit
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, offset: int, length: int) -> bytes:
        """`length` bytes of `path` from `offset`; a shorter file is a CorruptRecordError."""
        data = os.pread(self._open(path), length, offset)
        if len(data) != length:
            raise CorruptRecordError(
                f"{path}: expected {length} bytes at offset {offset}, got {len(data)}; the file "
                "changed after it was indexed"
            )
        return data

    def advise(self, path: str, offset: int, length: int) -> None:
        """Let the kernel fetch a span in one go, for reads that come soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._open(path), offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close all files; the reader can be used again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _open(self, path: str) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            self._descriptors[path] = descriptor
            if len(self._descriptors) > self.limit:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(path)
        return descriptor

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, int]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.limit = state["limit"]
        self._descriptors = OrderedDict()


_LANE = 128
_PIECE = 2**18


def _byte_table() -> np.ndarray:
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, (crc >> 1) ^ np.uint32(0x82F63B78), crc >> 1)
    return crc


_TABLE = _byte_table()
_TABLE_LIST = _TABLE.tolist()


def _advance(crc: np.ndarray, table: np.ndarray) -> np.ndarray:
    return (
        table[0][crc & 0xFF]
        ^ table[1][(crc >> 8) & 0xFF]
        ^ table[2][(crc >> 16) & 0xFF]
        ^ table[3][crc >> 24]
    )


@lru_cache(maxsize=64)
def _advance_table(level: int) -> np.ndarray:
    """For each of the four bytes of a CRC, what `_LANE * 2**level` zero bytes make of it."""
    if level:
        half = _advance_table(level - 1)
        return _advance(half, half)
    crc = np.arange(256, dtype=np.uint32)[None, :] << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(_LANE):
        crc = _TABLE[crc & 0xFF] ^ (crc >> 8)
    return crc
