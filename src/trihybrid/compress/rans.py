"""Matrices of small integers in few bytes: the entropy coder of `rans_streams`, with classes of rows or columns.

A matrix is one stream, or its rows (or columns) are sorted by size into 2, 4 or 8 classes with a table and a stream
each, whichever is smallest by the entropies.

Matrix: kind u8 (log2 of the classes, + 4 for columns), class of every row (packed), then the streams.
All little-endian. Shapes: R rows, C columns.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Final

import numpy as np

from trihybrid.compress.packing import pack, packed_bytes, unpack
from trihybrid.compress.rans_streams import (
    Bytes,
    Reader,
    Stream,
    decode_streams,
    encode_streams,
    lane_count,
)

# A histogram for every row is held while classes are chosen.
MOST_CLASSED_ROWS: Final = 2**14
COLUMNS: Final = 4

Int8 = np.ndarray[Any, np.dtype[np.int8]]


def encode_matrix(matrix_RC: Int8) -> bytes:
    """An int8 matrix [R, C] as bytes; the same matrix always gives the same bytes."""
    return encode_matrices([matrix_RC])[0]


def encode_matrices(matrices: Sequence[Int8]) -> list[bytes]:
    """`encode_matrix` of each, whose bytes do not depend on its company; together they take a fraction of the time."""
    heads, streams, counts = [], [], []
    for matrix_RC in matrices:
        symbols_RC = (matrix_RC.astype(np.int16) + 128).astype(np.uint8)
        kind, classes_R = _choose_classes(symbols_RC)
        if kind & COLUMNS:
            symbols_RC = symbols_RC.T
        heads.append(bytes([kind]) + (pack(classes_R, kind % COLUMNS) if kind else b""))
        counts.append(1 << kind % COLUMNS)
        streams += [symbols_RC[classes_R == number].ravel() for number in range(counts[-1])]
    encoded = iter(encode_streams(streams))
    return [head + b"".join(islice(encoded, count)) for head, count in zip(heads, counts, strict=True)]


def decode_matrix(data: bytes, rows: int, columns: int) -> Int8:
    """The inverse of `encode_matrix`: int8 [rows, columns], whatever the bytes.

    Raises:
        ValueError: the bytes are not a matrix of this shape.
    """
    coded = CodedMatrix(data, rows, columns)
    decode_together([coded])
    return coded.matrix()


class CodedMatrix:
    """Bytes of `encode_matrix` on their way back: split into streams, then decoded by `decode_together`, then `matrix`.

    Args:
        data: the bytes.
        rows, columns: of the matrix, at least 1 each.

    Raises:
        ValueError: the bytes are not split into the streams of such a matrix.
    """

    def __init__(self, data: bytes, rows: int, columns: int) -> None:
        reader = Reader(data)
        kind = reader.byte()
        log2_classes, self.transposed = kind % COLUMNS, bool(kind & COLUMNS)
        if kind >= 2 * COLUMNS or (self.transposed and not log2_classes):
            raise ValueError(f"rans: {kind} is not a kind of matrix")
        self.shape = (columns, rows) if self.transposed else (rows, columns)
        self.classes_R = np.zeros(self.shape[0], np.uint8)
        if log2_classes:
            packed = reader.take(packed_bytes(self.shape[0], log2_classes))
            self.classes_R = unpack(packed, log2_classes, self.shape[0])
        members = np.bincount(self.classes_R, minlength=1 << log2_classes)
        if not members.all():
            raise ValueError("rans: a class has no rows")
        self.streams = [Stream.read(reader, count * self.shape[1]) for count in members.tolist()]
        reader.finish()

    def matrix(self) -> Int8:
        """int8 [rows, columns], once. ValueError: what was decoded is not what an encoder wrote."""
        symbols_RC = np.empty(self.shape, np.uint8)
        for number, stream in enumerate(self.streams):
            symbols_RC[self.classes_R == number] = stream.symbols().reshape(-1, self.shape[1])
        matrix_RC = (symbols_RC.astype(np.int16) - 128).astype(np.int8)
        return np.ascontiguousarray(matrix_RC.T) if self.transposed else matrix_RC


def decode_together(matrices: Iterable[CodedMatrix]) -> None:
    """Decode the streams of all these matrices side by side, which takes a fraction of the time."""
    decode_streams([stream for coded in matrices for stream in coded.streams])


def _choose_classes(symbols_RC: Bytes) -> tuple[int, Bytes]:
    """(kind, class of every row or column) of the smallest coding by estimate."""
    best_kind, best_classes = 0, np.zeros(len(symbols_RC), np.uint8)
    best_bits = np.inf
    for side, lines in ((0, symbols_RC), (COLUMNS, symbols_RC.T)):
        if len(lines) > MOST_CLASSED_ROWS:
            continue
        rows = np.arange(len(lines))[:, None] * 256
        counts = np.bincount((rows + lines).ravel(), minlength=256 * len(lines)).reshape(-1, 256)
        size = counts @ (np.arange(256.0) - 128) ** 2
        order = np.argsort(size, kind="stable")
        rank = np.argsort(order, kind="stable")
        finest = min(3, len(lines).bit_length() - 1)
        # Lines of a class stand side by side in the order of their sizes, and two classes make one of the next coarser.
        firsts = -(-np.arange(1 << finest) * len(lines) >> finest)
        totals = np.add.reduceat(counts[order], firsts, axis=0)
        for log2_classes in range(finest + 1):
            classes = (rank << log2_classes) // len(lines)
            merged = totals.reshape(1 << log2_classes, -1, 256).sum(1)
            bits = len(lines) * log2_classes + sum(_estimated_bits(total) for total in merged)
            if bits < best_bits:
                kind = side + log2_classes if log2_classes else 0
                best_kind, best_classes, best_bits = kind, classes.astype(np.uint8), bits
    if not best_kind:
        best_classes = np.zeros(len(symbols_RC), np.uint8)
    return best_kind, best_classes


def _estimated_bits(counts: np.ndarray[Any, Any]) -> float:
    """Bits of a stream: entropy, table (12 bits a symbol) and states (half of each is put to use)."""
    present = counts[counts > 0]
    entropy = float((present * np.log2(counts.sum() / present)).sum())
    return entropy + 12 * len(present) + 16 * lane_count(int(counts.sum())) + 48
