"""How client and worker talk: length-prefixed msgpack over a local socket.

A numpy array travels as its dtype, shape and bytes. Nothing is unpickled, so a message can carry
data only. Both sides use this file, also under interpreters that know nothing of pizero's other
dependencies: it needs numpy and msgpack.
"""

from __future__ import annotations

import math
import socket
import struct
from typing import Any

import msgpack
import numpy as np

_ARRAY = 1  # msgpack extension code of an array
_KINDS = "biuf"  # bool, integers, floats: nothing that could hold a Python object
_HEADER = struct.Struct(">Q")
_MAX_BYTES = 1 << 31


def pack(message: Any) -> bytes:
    """A message as bytes. Refuses what is not plain data."""
    data = msgpack.packb(message, default=_encode, use_bin_type=True)
    assert data is not None
    return data


def unpack(data: bytes) -> Any:
    """The message that `pack` wrote. Arrays are read-only views of the received bytes."""
    return msgpack.unpackb(data, ext_hook=_decode, raw=False, strict_map_key=False)


def send(connection: socket.socket, message: Any) -> None:
    """Send one message whole."""
    data = pack(message)
    connection.sendall(_HEADER.pack(len(data)) + data)


def receive(connection: socket.socket) -> Any:
    """Wait for one message. EOFError when the other side has gone."""
    (size,) = _HEADER.unpack(_read(connection, _HEADER.size))
    if size > _MAX_BYTES:
        raise ValueError(f"a message of {size} bytes is announced; at most {_MAX_BYTES} are taken")
    return unpack(_read(connection, size))


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        count = connection.recv_into(view[done:])
        if count == 0:
            raise EOFError("the connection was closed")
        done += count
    return bytes(data)


def _encode(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
        data = np.ascontiguousarray(value)
        return msgpack.ExtType(
            _ARRAY, msgpack.packb((value.dtype.str, list(value.shape), data.tobytes()))
        )
    kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise TypeError(f"only plain values and number arrays can be sent, not {kind}")


def _decode(code: int, data: bytes) -> Any:
    if code != _ARRAY:
        raise ValueError(f"unknown msgpack extension {code}; expected {_ARRAY} (an array)")
    name, shape, raw = msgpack.unpackb(data, raw=False)
    dtype = np.dtype(name)
    if dtype.kind not in _KINDS:
        raise ValueError(f"an array of {dtype} is not accepted")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"array of {dtype} {shape} came with {len(raw)} bytes")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)
