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

from pizero.data.checksum import crc32c

HEADER_BYTES = 12  # length and its checksum
FOOTER_BYTES = 4  # checksum of the payload


class CorruptRecordError(ValueError):
    """A TFRecord file that ends early or whose checksum does not match."""


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
