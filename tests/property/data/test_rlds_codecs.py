"""Codecs undo themselves, and normalisation its inverse, for whatever values."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pizero.data import Normalizer, Statistics
from pizero.data.checksum import _TABLE_LIST, crc32c, crc32c_numpy
from pizero.data.rlds.example import decode_varints, encode_example, encode_varints, parse_example
from pizero.data.rlds.tfrecord import (
    frame_record,
    scan_records,
    verify_record,
)

quick = settings(deadline=None, max_examples=25)

int64s = npst.arrays(np.int64, st.integers(0, 50), elements=st.integers(-(2**63), 2**63 - 1))
finite = st.floats(-1e3, 1e3)


@quick
@given(int64s)
def test_varints(values):
    np.testing.assert_array_equal(decode_varints(encode_varints(values)), values)


@quick
@given(
    st.dictionaries(
        st.text(max_size=200),
        st.lists(st.binary(max_size=300), max_size=5)
        | int64s
        | npst.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)),
        max_size=6,
    )
)
def test_examples(features):
    parsed = parse_example(encode_example(features))
    assert set(parsed) == set(features)
    for key, value in features.items():
        if isinstance(value, list):
            assert parsed[key].strings() == value
        else:
            got = parsed[key].floats() if value.dtype.kind == "f" else parsed[key].ints()
            np.testing.assert_array_equal(got, value)


@quick
@given(st.binary(max_size=700), st.integers(0, 6))
def test_crc_equals_the_bytewise_one(piece, repeat):
    data = piece * (repeat + 1)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE_LIST[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    assert crc32c_numpy(data) == crc32c(data) == crc ^ 0xFFFFFFFF


@quick
@given(st.lists(st.binary(max_size=600), max_size=5))
def test_records(payloads):
    data = b"".join(map(frame_record, payloads))
    spans = list(scan_records(memoryview(data), name="f"))
    for start, size in spans:
        verify_record(memoryview(data), start, size, name="f")
    assert [data[start : start + size] for start, size in spans] == payloads


@quick
@given(
    values=npst.arrays(np.float64, st.tuples(st.integers(1, 30), st.just(3)), elements=finite),
    x=npst.arrays(np.float64, (4, 3), elements=finite),
    kind=st.sampled_from(["z_score", "quantile", "min_max", "identity"]),
    mask=st.none() | st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_denormalize_undoes_normalize(values, x, kind, mask):
    normalizer = Normalizer(kind=kind, statistics=Statistics.of(values), mask=mask)
    y = normalizer.normalize(x)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(normalizer.denormalize(y), x, atol=1e-6, rtol=1e-9)
    # No dimension is stretched by more than the smallest spread allows.
    assert (normalizer.scale >= 5e-5).all()
