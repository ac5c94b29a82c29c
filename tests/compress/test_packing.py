"""b-bit packing: the exact inverse at every length, the size promised, and the bit order written down."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.compress.packing import _ROUND, pack, packed_bytes, unpack


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 8), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_unpacking_is_the_inverse(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    packed = pack(values, bits)
    assert len(packed) == packed_bytes(count, bits) == -(-count * bits // 8)
    assert np.array_equal(unpack(packed, bits, count), values)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_rounds_join_without_a_seam(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, _ROUND + 13).astype(np.uint8)
    packed = pack(values, bits)
    assert len(packed) == packed_bytes(values.size, bits)
    assert np.array_equal(unpack(packed, bits, values.size), values)


def test_the_first_value_is_in_the_lowest_bits() -> None:
    assert pack(np.array([1, 2, 3], np.uint8), 6) == (1 | 2 << 6 | 3 << 12).to_bytes(3, "little")


@pytest.mark.parametrize(
    ("data", "bits", "count", "message"),
    [
        (b"\0\0", 6, 1, "take 1 bytes"),
        (b"", 6, 1, "take 1 bytes"),
        (b"\0", 6, 2, "take 2 bytes"),
        (b"", 6, -1, "not 0"),
        (b"\x40", 6, 1, "set after the last"),
        (b"\x80", 7, 1, "set after the last"),
        (b"\0", 9, 1, "bits is 9"),
    ],
)
def test_what_is_not_a_packing_is_refused(data: bytes, bits: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(data, bits, count)


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="64 does not fit 6 bits"):
        pack(np.array([63, 64], np.uint8), 6)
    with pytest.raises(ValueError, match="bits is 0"):
        pack(np.array([0], np.uint8), 0)
