"""The wire format of `tf.train.Example`, read and written without protobuf.

An episode of RLDS is one Example: a map from a flat key to a list of bytes, floats or integers.
`parse_example` finds where each list lies and copies nothing, so a mapped file is only touched at
the headers: floats come out as views, byte strings as offsets into the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Value = Sequence[bytes] | np.ndarray

_KINDS = {1: "bytes", 2: "float", 3: "int"}
_FIELDS = {"bytes": 1, "float": 2, "int": 3}


@dataclass(frozen=True)
class Feature:
    """One list inside a parsed Example: its kind, the buffer, and the span that holds it."""

    kind: str
    buffer: memoryview
    start: int
    end: int

    def spans(self) -> np.ndarray:
        """Offset and length of every byte string, int64 [n 2], relative to the buffer."""
        self._expect("bytes")
        found = [
            (start, end - start)
            for field, wire, start, end in _fields(self.buffer, self.start, self.end)
            if field == 1 and wire == 2
        ]
        return np.array(found, np.int64).reshape(-1, 2)

    def strings(self) -> list[bytes]:
        """Every byte string, copied."""
        return [bytes(self.buffer[start : start + size]) for start, size in self.spans().tolist()]

    def floats(self) -> np.ndarray:
        """float32 [n]; a view of the buffer where the list is packed in one piece."""
        self._expect("float")
        pieces = [
            np.frombuffer(self.buffer[start:end], "<f4")
            for field, _, start, end in _fields(self.buffer, self.start, self.end)
            if field == 1
        ]
        return _join(pieces, np.dtype("<f4"))

    def ints(self) -> np.ndarray:
        """int64 [n], decoded from varints."""
        self._expect("int")
        pieces = [
            decode_varints(self.buffer[start:end])
            for field, _, start, end in _fields(self.buffer, self.start, self.end)
            if field == 1
        ]
        return _join(pieces, np.dtype(np.int64))

    def _expect(self, kind: str) -> None:
        if self.kind != kind:
            raise ValueError(f"expected a list of {kind} values, got a list of {self.kind} values")


def parse_example(buffer: bytes | memoryview) -> dict[str, Feature]:
    """The features of one serialised Example by key; a key given twice keeps its last value."""
    view = memoryview(buffer)
    features: dict[str, Feature] = {}
    for outer, _, start, end in _fields(view, 0, len(view)):
        if outer != 1:
            continue
        for inner, _, entry_start, entry_end in _fields(view, start, end):
            if inner == 1:
                key, feature = _parse_entry(view, entry_start, entry_end)
                features[key] = feature
    return features


def encode_example(features: Mapping[str, Value]) -> bytes:
    """Serialise an Example: byte strings as lists, floating and integer arrays packed.

    Keys are written in sorted order, so equal episodes give equal bytes.
    """
    return _block(1, b"".join(_entry(key, features[key]) for key in sorted(features)))


def replace_features(buffer: bytes | memoryview, changed: Mapping[str, Value]) -> bytes:
    """A serialised Example with other lists under some keys; all else stays byte for byte."""
    view = memoryview(buffer)
    pieces: list[bytes | memoryview] = []
    last = 0
    for outer, _, start, end in _fields(view, 0, len(view)):
        if outer == 1:
            pieces.append(_block(1, _replace_entries(view, start, end, changed)))
        else:
            pieces.append(view[last:end])  # with the tag in front
        last = end
    return b"".join(pieces)


def decode_varints(data: bytes | memoryview) -> np.ndarray:
    """All varints in `data` as int64 [n]."""
    octets = np.frombuffer(data, np.uint8)
    if octets.size == 0:
        return np.zeros(0, np.int64)
    is_last = octets < 0x80
    if is_last.all():
        return octets.astype(np.int64)
    if not is_last[-1]:
        raise ValueError("a varint is cut off at the end of the Example")
    starts = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])
    lengths = np.diff(np.append(starts, octets.size))
    if lengths.max() > 10:
        raise ValueError(f"a varint has {lengths.max()} bytes; at most 10 are legal")
    place = np.arange(octets.size) - np.repeat(starts, lengths)
    shifted = (octets & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(shifted, starts).view(np.int64)


def encode_varints(values: np.ndarray) -> bytes:
    """Integers [n] as varints; negative ones take ten bytes, as protobuf has it."""
    values = np.ascontiguousarray(values.ravel().astype(np.int64)).view(np.uint64)
    if values.size == 0 or values.max() < 0x80:
        return values.astype(np.uint8).tobytes()
    place = np.arange(10, dtype=np.uint64)
    rest = values[:, None] >> (7 * place)
    more = np.concatenate([rest[:, 1:] != 0, np.zeros((len(rest), 1), bool)], axis=1)
    octets = (rest & 0x7F).astype(np.uint8) | (more.astype(np.uint8) << 7)
    used = np.concatenate([np.ones((len(rest), 1), bool), more[:, :-1]], axis=1)
    return octets[used].tobytes()


def _replace_entries(view: memoryview, start: int, end: int, changed: Mapping[str, Value]) -> bytes:
    pieces: list[bytes | memoryview] = []
    last = start
    for inner, _, entry_start, entry_end in _fields(view, start, end):
        key = _parse_entry(view, entry_start, entry_end)[0] if inner == 1 else ""
        if inner == 1 and key in changed:
            pieces.append(_entry(key, changed[key]))
        else:
            pieces.append(view[last:entry_end])
        last = entry_end
    return b"".join(pieces)


def _entry(key: str, value: Value) -> bytes:
    kind, body = _encode_list(key, value)
    return _block(1, _block(1, key.encode()) + _block(2, _block(_FIELDS[kind], body)))


def _parse_entry(view: memoryview, start: int, end: int) -> tuple[str, Feature]:
    key = ""
    feature = Feature("bytes", view, start, start)
    for field, _, value_start, value_end in _fields(view, start, end):
        if field == 1:
            key = bytes(view[value_start:value_end]).decode()
        elif field == 2:
            for kind, _, list_start, list_end in _fields(view, value_start, value_end):
                feature = Feature(_KINDS.get(kind, "bytes"), view, list_start, list_end)
    return key, feature


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Field number, wire type and payload span of each field of a message."""
    while start < end:
        tag, start = _varint(view, start, end)
        wire = tag & 7
        if wire == 2:
            size, start = _varint(view, start, end)
            stop = start + size
        elif wire == 0:
            _, stop = _varint(view, start, end)
        elif wire == 5:
            stop = start + 4
        elif wire == 1:
            stop = start + 8
        else:
            raise ValueError(f"not a tf.train.Example: wire type {wire} at byte {start}")
        if stop > end:
            raise ValueError(
                f"not a tf.train.Example: a field of {stop - start} bytes at byte {start} passes "
                f"the end of its message at byte {end}"
            )
        yield tag >> 3, wire, start, stop
        start = stop


def _varint(view: memoryview, start: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while start < end:
        octet = view[start]
        start += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, start
        shift += 7
    raise ValueError("a varint is cut off at the end of the Example")


def _join(pieces: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)


def _encode_list(key: str, value: Value) -> tuple[str, bytes]:
    if not isinstance(value, np.ndarray):
        return "bytes", b"".join(_block(1, item) for item in value)
    if value.dtype.kind == "f":
        packed = np.ascontiguousarray(value, "<f4").tobytes()
        return "float", _block(1, packed) if packed else b""
    if value.dtype.kind in "iub":
        packed = encode_varints(value)
        return "int", _block(1, packed) if packed else b""
    raise ValueError(f"{key}: an Example holds bytes, floats or integers, got {value.dtype}")


def _block(field: int, body: bytes) -> bytes:
    size = len(body)
    header = bytearray([field << 3 | 2])
    while size >= 0x80:
        header.append(size & 0x7F | 0x80)
        size >>= 7
    header.append(size)
    return bytes(header) + body
