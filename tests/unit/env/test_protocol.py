"""Messages arrive as they were sent, and only data can be sent."""

from __future__ import annotations

import socket

import msgpack
import numpy as np
import pytest

from pizero.agent.env import protocol


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "int64", "bool", ">f4"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_arrays_keep_type_shape_and_values(dtype, shape):
    array = np.empty(shape, dtype)
    array[...] = np.random.default_rng(0).random(shape) * 200
    got = protocol.unpack(protocol.pack({"a": [array]}))["a"][0]
    assert got.dtype == np.dtype(dtype)
    assert got.shape == shape
    np.testing.assert_array_equal(got, array)


def test_a_view_is_sent_as_it_looks():
    array = np.arange(12).reshape(3, 4)[::2, ::-1]
    np.testing.assert_array_equal(protocol.unpack(protocol.pack(array)), array)


def test_plain_values_and_numpy_scalars():
    message = {"text": "öffne", "n": 3, "x": 0.5, "flag": True, "none": None, "bytes": b"\x00"}
    assert protocol.unpack(protocol.pack(message)) == message
    assert protocol.unpack(protocol.pack([np.float32(0.5), np.bool_(True)])) == [0.5, True]


@pytest.mark.parametrize(
    ("value", "named"),
    [(object(), "object"), (np.array([{}], dtype=object), "array of object"), ({1}, "set")],
)
def test_objects_are_refused(value, named):
    with pytest.raises(TypeError, match=f"only plain values and number arrays.*{named}"):
        protocol.pack(value)


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (1, ("|O", [1], b"12345678"), "not accepted"),
        (1, ("<f4", [3], b"1234"), "came with 4 bytes"),
        (9, (), "unknown msgpack extension 9"),
    ],
)
def test_forged_arrays_are_refused(code, body, message):
    with pytest.raises(ValueError, match=message):
        protocol.unpack(msgpack.packb(msgpack.ExtType(code, msgpack.packb(body))))


def test_messages_over_a_socket_and_its_end():
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            array = np.zeros((50, 50), np.float32)
            protocol.send(ours, {"array": array})
            protocol.send(ours, "second")
            assert protocol.receive(theirs)["array"].shape == (50, 50)
            assert protocol.receive(theirs) == "second"
        with pytest.raises(EOFError, match="closed"):
            protocol.receive(theirs)


def test_an_absurd_length_is_refused():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"\xff" * 8)
        with pytest.raises(ValueError, match="announced"):
            protocol.receive(theirs)
