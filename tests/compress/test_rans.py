"""rANS: exact, close to the entropy, equal to the formula one symbol at a time, and deaf to damage."""

import numpy as np
import pytest
from artifact_by_definition import simple_rans
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.compress.rans import (
    CodedMatrix,
    decode_matrix,
    decode_together,
    encode_matrices,
    encode_matrix,
)
from trihybrid.compress.rans_streams import (
    MOST_TOGETHER,
    PRECISION,
    decode_stream,
    encode_stream,
    lane_count,
    quantise_frequencies,
)


def integers(distribution: str, rows: int, columns: int, clip: float, seed: int = 0) -> np.ndarray:
    """Integers of 6 bits, one unit of the distribution being 32 / clip."""
    generator = np.random.default_rng(seed)
    draw = {"gaussian": generator.standard_normal, "laplace": lambda shape: generator.laplace(size=shape)}
    values = draw[distribution]((rows, columns)) * 32 / clip
    return np.clip(np.rint(values), -32, 31).astype(np.int8)


def entropy_bits(symbols: np.ndarray) -> float:
    """The empirical entropy of all symbols together, in bits."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float((counts * np.log2(counts.sum() / counts)).sum())


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.4, 3.0, 90.0]), st.integers(0, 2**32 - 1)
)
def test_decoding_is_the_inverse(rows: int, columns: int, size: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, columns)) * size * np.exp(generator.standard_normal((rows, 1)))
    matrix = np.clip(values, -128, 127).astype(np.int8)
    encoded = encode_matrix(matrix)
    assert encoded == encode_matrix(np.asfortranarray(matrix))
    assert np.array_equal(decode_matrix(encoded, rows, columns), matrix)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=8), st.integers(0, 2**32 - 1))
def test_company_changes_no_byte(shapes: list[tuple[int, int]], seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = np.exp(generator.uniform(-2, 4, len(shapes)))
    matrices = [
        np.clip(np.rint(size * generator.standard_normal(shape)), -128, 127).astype(np.int8)
        for size, shape in zip(sizes, shapes, strict=True)
    ]
    encoded = encode_matrices(matrices)
    assert encoded == [encode_matrix(matrix) for matrix in matrices]
    coded = [CodedMatrix(data, *shape) for data, shape in zip(encoded, shapes, strict=True)]
    decode_together(coded)
    for part, matrix in zip(coded, matrices, strict=True):
        assert np.array_equal(part.matrix(), matrix)


def test_more_streams_than_go_together() -> None:
    generator = np.random.default_rng(4)
    matrices = [
        generator.integers(-3, 4, (2, 3)).astype(np.int8) for _ in range(2 * MOST_TOGETHER // 2**PRECISION)
    ]
    encoded = encode_matrices(matrices)
    coded = [CodedMatrix(data, 2, 3) for data in encoded]
    decode_together(coded)
    assert all(np.array_equal(part.matrix(), matrix) for part, matrix in zip(coded, matrices, strict=True))


def test_a_neighbour_that_lacks_words_harms_nobody() -> None:
    matrix = integers("gaussian", 48, 40, 6.0)
    whole, cheap = encode_matrix(matrix), encode_matrix(matrix * 0)
    damaged = CodedMatrix(whole, 48, 40)
    damaged.streams[0].words = damaged.streams[0].words[:-5]
    neighbours = [CodedMatrix(data, 48, 40) for data in (whole, cheap)]
    decode_together([neighbours[0], damaged, neighbours[1]])
    with pytest.raises(ValueError, match="end too early"):
        damaged.matrix()
    assert np.array_equal(neighbours[0].matrix(), matrix)
    assert not neighbours[1].matrix().any()


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(0, 9_000), st.integers(1, 256), st.integers(0, 2**32 - 1))
def test_every_length_and_alphabet(count: int, alphabet: int, seed: int) -> None:
    symbols = np.random.default_rng(seed).integers(0, alphabet, count).astype(np.uint8)
    assert np.array_equal(decode_stream(encode_stream(symbols), count), symbols)


@pytest.mark.parametrize("clip", [4.0, 6.0, 12.85])
@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_within_half_a_percent_of_the_entropy(distribution: str, clip: float) -> None:
    matrix = integers(distribution, 512, 512, clip)
    encoded = encode_matrix(matrix)
    assert 8 * len(encoded) < 1.005 * entropy_bits(matrix)
    assert np.array_equal(decode_matrix(encoded, 512, 512), matrix)


@pytest.mark.parametrize("axis", [0, 1])
def test_classes_of_rows_or_columns_beat_one_table(axis: int) -> None:
    """Rows (or columns) of very different size: below the entropy of all symbols together."""
    sizes = np.expand_dims(np.exp(0.5 * np.random.default_rng(1).standard_normal(256)), 1 - axis)
    matrix = np.clip(np.rint(integers("gaussian", 256, 256, 12.85) * sizes), -32, 31).astype(np.int8)
    encoded = encode_matrix(matrix)
    assert encoded[0] == 3 + 4 * axis
    assert 8 * len(encoded) < 0.97 * entropy_bits(matrix)
    assert np.array_equal(decode_matrix(encoded, 256, 256), matrix)


@pytest.mark.parametrize(
    ("rows", "columns", "clip"), [(1, 1, 4.0), (3, 7, 4.0), (40, 24, 6.0), (96, 64, 6.0), (64, 80, 0.5)]
)
def test_equal_to_the_formula_one_symbol_at_a_time(rows: int, columns: int, clip: float) -> None:
    sizes = np.exp(np.random.default_rng(2).standard_normal(columns))
    matrix = np.clip(integers("gaussian", rows, columns, clip) * sizes, -32, 31).astype(np.int8)
    assert simple_rans(encode_matrix(matrix), rows, columns, 6) == matrix.tobytes()


def test_a_constant_costs_its_lanes_only() -> None:
    matrix = np.full((512, 512), -7, np.int8)
    encoded = encode_matrix(matrix)
    assert len(encoded) == 1 + 2 + 3 + 1 + 4 * lane_count(512 * 512)
    assert np.array_equal(decode_matrix(encoded, 512, 512), matrix)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(st.one_of(st.just(0), st.integers(1, 3), st.integers(0, 10**9)), min_size=1, max_size=256))
def test_frequencies_sum_up_and_keep_every_symbol(counts: list[int]) -> None:
    padded = np.zeros(256, np.int64)
    padded[: len(counts)] = counts
    padded[0] += not padded.any()
    frequencies = quantise_frequencies(padded)
    assert frequencies.sum() == 2**PRECISION
    assert ((frequencies > 0) == (padded > 0)).all()


def test_no_single_unit_moved_makes_the_frequencies_better() -> None:
    counts = np.bincount(integers("gaussian", 64, 64, 6.0).ravel() + np.int16(128), minlength=256)
    frequencies = quantise_frequencies(counts).astype(np.float64)

    def cost(values: np.ndarray) -> float:
        used = counts > 0
        return -float((counts[used] * np.log2(values[used])).sum())

    for one in np.flatnonzero(frequencies > 1):
        for other in np.flatnonzero(frequencies):
            moved = frequencies.copy()
            moved[one] -= 1
            moved[other] += 1
            assert cost(moved) >= cost(frequencies) - 1e-9


def test_damage_is_refused_or_gives_a_matrix_of_the_same_shape() -> None:
    matrix = integers("gaussian", 12, 16, 6.0)
    encoded = encode_matrix(matrix)
    generator = np.random.default_rng(3)
    refused = 0
    for _ in range(150):
        damaged = bytearray(encoded)
        damaged[generator.integers(len(damaged))] ^= 1 << generator.integers(8)
        try:
            decoded = decode_matrix(bytes(damaged), 12, 16)
            assert (decoded.shape, decoded.dtype) == ((12, 16), np.int8)
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("size", [0, 1, 2, 3, 40, -1])
def test_a_stream_that_is_cut_is_refused(size: int) -> None:
    encoded = encode_matrix(integers("gaussian", 24, 40, 6.0))
    with pytest.raises(ValueError, match="rans"):
        decode_matrix(encoded[:size], 24, 40)
    with pytest.raises(ValueError, match="left over"):
        decode_matrix(encoded + b"\0", 24, 40)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes([8]), "kind of matrix"),
        (bytes([4]), "kind of matrix"),
        (bytes([1, 0]), "class has no rows"),
        (bytes([0, 255, 1, 0, 0]), "above 255"),
        (bytes([0, 0, 0, 5, 0]), "sum to 5"),
        (bytes([0, 0, 0]) + b"\xff" * 6, "too many digits"),
        (bytes([0, 0, 0, 128, 128, 1]) + b"\xff\xff\xff\xff\x0f", "bytes are needed"),
        (bytes([0, 0, 0, 128, 128, 1, 0]) + b"\0\0\0\0", "below its range"),
        (bytes([0, 0, 0, 128, 128, 1, 0]) + b"\0\0\2\0", "start states"),
        (bytes([0, 0, 0, 128, 128, 1, 0]) + b"\0\1\1\0", "start states"),
        (bytes([0, 0, 0, 128, 128, 1, 1]) + b"\0\0\1\0\0\0", "words are left over"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_matrix(data, 1, 1)
