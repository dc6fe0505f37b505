"""The Example parser and writer against protobuf itself."""

from __future__ import annotations

import numpy as np
import pytest

from pizero.data.rlds.example import (
    decode_varints,
    encode_example,
    parse_example,
    replace_features,
)

VALUES = {
    "bytes": [b"abc", b"", b"\x00" * 300],
    "float": np.array([1.5, -2.25, 3e38], np.float32),
    "int": np.array([0, 1, 127, 128, -1, 2**62, -(2**63)], np.int64),
    "empty/float": np.zeros(0, np.float32),
    "flag": np.array([True, False]),
}


@pytest.fixture(scope="module")
def proto():
    return pytest.importorskip("tensorflow_datasets.proto").tf_example_pb2


def test_protobuf_reads_what_we_write(proto):
    example = proto.Example.FromString(encode_example(VALUES))
    feature = example.features.feature
    assert list(feature["bytes"].bytes_list.value) == VALUES["bytes"]
    assert list(feature["float"].float_list.value) == VALUES["float"].tolist()
    assert list(feature["int"].int64_list.value) == VALUES["int"].tolist()
    assert list(feature["flag"].int64_list.value) == [1, 0]
    assert feature["empty/float"].WhichOneof("kind") == "float_list"


def test_we_read_what_protobuf_writes(proto):
    example = proto.Example()
    feature = example.features.feature
    feature["bytes"].bytes_list.value.extend(VALUES["bytes"])
    feature["float"].float_list.value.extend(VALUES["float"].tolist())
    feature["int"].int64_list.value.extend(VALUES["int"].tolist())
    feature["none"].int64_list.SetInParent()
    parsed = parse_example(example.SerializeToString())
    assert parsed["bytes"].strings() == VALUES["bytes"]
    np.testing.assert_array_equal(parsed["float"].floats(), VALUES["float"])
    np.testing.assert_array_equal(parsed["int"].ints(), VALUES["int"])
    assert parsed["none"].ints().shape == (0,)


def test_unpacked_lists_and_unknown_fields_are_read():
    # field 7 (unknown, varint), then {"f": floats 1, 2 unpacked} and {"i": ints 3, 300 unpacked}
    floats = b"\x0d\x00\x00\x80\x3f\x0d\x00\x00\x00\x40"
    ints = b"\x08\x03\x08\xac\x02"
    entries = [
        b"\x0a\x01f\x12" + bytes([len(floats) + 2]) + b"\x12" + bytes([len(floats)]) + floats,
        b"\x0a\x01i\x12" + bytes([len(ints) + 2]) + b"\x1a" + bytes([len(ints)]) + ints,
    ]
    features = b"".join(b"\x0a" + bytes([len(e)]) + e for e in entries)
    parsed = parse_example(b"\x38\x05" + b"\x0a" + bytes([len(features)]) + features)
    assert parsed["f"].floats().tolist() == [1.0, 2.0]
    assert parsed["i"].ints().tolist() == [3, 300]


def test_floats_are_a_view_and_spans_point_into_the_buffer():
    data = encode_example(VALUES)
    parsed = parse_example(data)
    assert np.shares_memory(parsed["float"].floats(), np.frombuffer(data, np.uint8))
    start, size = parsed["bytes"].spans()[0]
    assert data[start : start + size] == b"abc"


def test_equal_values_give_equal_bytes_in_any_order():
    assert encode_example(VALUES) == encode_example(dict(reversed(VALUES.items())))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x7f\x00", "a field of 127 bytes at byte 2 passes the end .* at byte 3"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\xff", "varint is cut off"),
    ],
)
def test_other_bytes_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_example(data)


def test_broken_varints_are_refused():
    with pytest.raises(ValueError, match="cut off"):
        decode_varints(b"\x01\x80")
    with pytest.raises(ValueError, match="at most 10"):
        decode_varints(b"\x80" * 11 + b"\x01")


def test_wrong_kind_is_refused():
    parsed = parse_example(encode_example(VALUES))
    with pytest.raises(ValueError, match="expected a list of int values, got a list of float"):
        parsed["float"].ints()
    with pytest.raises(ValueError, match="key: an Example holds bytes, floats or integers"):
        encode_example({"key": np.array(["text"])})


def test_replaced_lists_leave_all_else_byte_for_byte():
    before = encode_example(VALUES)
    assert replace_features(before, {}) == before
    assert replace_features(before, VALUES) == before
    changed = VALUES | {"bytes": [b"x" * 1000], "float": np.array([7], np.float32)}
    assert replace_features(before, changed) == encode_example(changed)
    # A field of later versions, and one inside the map, stay where they are.
    unknown = b"\x38\x05" + before + b"\x0a\x02\x18\x07"
    after = replace_features(unknown, {"int": np.array([3])})
    assert after == b"\x38\x05" + encode_example(VALUES | {"int": np.array([3])}) + unknown[-4:]
    with pytest.raises(ValueError, match="passes the end of its message"):
        replace_features(before[:-3], {})
