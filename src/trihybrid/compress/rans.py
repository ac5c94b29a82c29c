"""A static entropy coder for matrices of small integers: interleaved rANS, vectorised over lanes with numpy.

J. Duda, "Asymmetric numeral systems" (arXiv:1311.2540); interleaving after F. Giesen (arXiv:1402.3392).

One stream codes symbols 0..255 with one table of frequencies f (they sum to 2**14; c is their running sum). A lane's
state x lies in [2**16, 2**32). Coding symbol s maps x to (x // f_s) 2**14 + x mod f_s + c_s, after its low 16 bits
went to the stream where the result would not fit; coding runs from the last symbol to the first, decoding the other
way. Symbol n belongs to lane n mod L, so that L lanes step at once. A start state is the coder's to choose: its low 16
bits hold two of the last symbols, which pays for part of a lane's 4 bytes.

A matrix is one stream, or its rows (or columns) are sorted by size into 2, 4 or 8 classes with a table and a stream
each, whichever is smallest by the entropies.

Stream: first symbol u8, symbols - 1 u8, a frequency each (varint), number of words (varint), L states u32, words u16.
Matrix: kind u8 (log2 of the classes, + 4 for columns), class of every row (packed), then the streams.
All little-endian. Shapes: R rows, C columns, N symbols, S steps, L lanes.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from trihybrid.compress.packing import pack, packed_bytes, unpack

PRECISION: Final = 14
LOWEST: Final = 2**16
SYMBOLS_PER_LANE: Final = 2048
MOST_LANES: Final = 2048
# A histogram for every row is held while classes are chosen.
MOST_CLASSED_ROWS: Final = 2**14
COLUMNS: Final = 4

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Words = np.ndarray[Any, np.dtype[np.uint32]]


def lane_count(count: int) -> int:
    """Lanes of a stream of `count` symbols: one for every 2,048, from 1 to 2,048."""
    return min(max(count // SYMBOLS_PER_LANE, 1), MOST_LANES)


def encode_matrix(matrix_RC: np.ndarray[Any, np.dtype[np.int8]]) -> bytes:
    """An int8 matrix [R, C] as bytes; the same matrix always gives the same bytes."""
    symbols_RC = (matrix_RC.astype(np.int16) + 128).astype(np.uint8)
    kind, classes_R = _choose_classes(symbols_RC)
    if kind & COLUMNS:
        symbols_RC = symbols_RC.T
    head = bytes([kind])
    if kind:
        head += pack(classes_R, kind % COLUMNS)
    return head + b"".join(
        encode_stream(symbols_RC[classes_R == number].ravel()) for number in range(1 << kind % COLUMNS)
    )


def decode_matrix(data: bytes, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    """The inverse of `encode_matrix`: int8 [rows, columns], whatever the bytes.

    Raises:
        ValueError: the bytes are not a matrix of this shape.
    """
    reader = _Reader(data)
    kind = reader.byte()
    log2_classes, transposed = kind % COLUMNS, bool(kind & COLUMNS)
    if kind >= 2 * COLUMNS or (transposed and not log2_classes):
        raise ValueError(f"rans: {kind} is not a kind of matrix")
    if transposed:
        rows, columns = columns, rows
    classes_R = np.zeros(rows, np.uint8)
    if log2_classes:
        classes_R = unpack(reader.take(packed_bytes(rows, log2_classes)), log2_classes, rows)
    members = np.bincount(classes_R, minlength=1 << log2_classes)
    if not members.all():
        raise ValueError("rans: a class has no rows")
    symbols_RC = np.empty((rows, columns), np.uint8)
    for number, count in enumerate(members.tolist()):
        symbols_RC[classes_R == number] = _read_stream(reader, count * columns).reshape(count, columns)
    reader.finish()
    matrix_RC = (symbols_RC.astype(np.int16) - 128).astype(np.int8)
    return np.ascontiguousarray(matrix_RC.T) if transposed else matrix_RC


def encode_stream(symbols_N: Bytes) -> bytes:
    """Symbols 0..255, uint8 [N], as one stream."""
    lanes = lane_count(symbols_N.size)
    body_N, tail_N = np.split(symbols_N, [max(symbols_N.size - 2 * lanes, 0)])
    counts = np.bincount(body_N, minlength=256)
    counts[0] += not body_N.size
    frequencies = quantise_frequencies(counts)
    # The last step is filled up with the cheapest symbol, which nobody reads.
    steps = -(-body_N.size // lanes)
    padded = np.full(steps * lanes, frequencies.argmax(), np.uint8)
    padded[: body_N.size] = body_N
    body_SL = padded.reshape(steps, lanes)

    tail_L2 = np.zeros(2 * lanes, np.uint8)
    tail_L2[: tail_N.size] = tail_N
    state_L, words = _encode_steps(body_SL, frequencies, LOWEST + tail_L2.view("<u2").astype(np.uint32))
    present = np.flatnonzero(frequencies)
    first, last = int(present[0]), int(present[-1])
    table = b"".join(_varint(int(frequency)) for frequency in frequencies[first : last + 1])
    return b"".join(
        (
            bytes([first, last - first]),
            table,
            _varint(words.size),
            state_L.astype("<u4").tobytes(),
            words.tobytes(),
        )
    )


def decode_stream(data: bytes, count: int) -> Bytes:
    """The inverse of `encode_stream`: uint8 [count].

    Raises:
        ValueError: the bytes are not a stream of that many symbols.
    """
    reader = _Reader(data)
    symbols_N = _read_stream(reader, count)
    reader.finish()
    return symbols_N


def quantise_frequencies(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Counts as frequencies that sum to 2**14, each at least 1 where the count is; int64 [256].

    The fewest bits for these counts: rounded, then corrected and improved one unit at a time. (The cost is a sum of
    convex functions, so what no exchange of two units makes better is best.)
    """
    present = np.flatnonzero(counts)
    number = counts[present].astype(np.float64)
    frequency = np.maximum(np.rint(number * 2**PRECISION / number.sum()), 1)
    while True:
        excess = int(frequency.sum()) - 2**PRECISION
        gain = number * np.log2((frequency + 1) / frequency)
        loss = np.full_like(gain, np.inf)
        many = frequency > 1
        loss[many] = number[many] * np.log2(frequency[many] / (frequency[many] - 1))
        if excess > 0:
            frequency[loss.argmin()] -= 1
        elif excess < 0 or gain.max() > loss.min() * (1 + 1e-9):
            frequency[gain.argmax()] += 1
        else:
            break
    frequencies = np.zeros(256, np.int64)
    frequencies[present] = frequency
    return frequencies


def _encode_steps(
    body_SL: Bytes, frequencies: np.ndarray[Any, Any], state_L: Words
) -> tuple[Words, np.ndarray[Any, Any]]:
    frequency_SL = frequencies.astype(np.uint32)[body_SL]
    start_SL = (np.cumsum(frequencies) - frequencies).astype(np.uint32)[body_SL]
    shift, half = np.uint32(32 - PRECISION), np.uint32(16)
    chunks = []
    for step in range(len(body_SL) - 1, -1, -1):
        frequency_L = frequency_SL[step]
        full = ((state_L >> shift) >= frequency_L).nonzero()[0]
        if full.size:
            states = state_L[full]
            chunks.append(states.astype("<u2"))
            state_L[full] = states >> half
        # (x // f) 2**14 + x mod f + c
        state_L = (
            state_L + (state_L // frequency_L) * (np.uint32(2**PRECISION) - frequency_L) + start_SL[step]
        )
    chunks.reverse()
    return state_L, np.concatenate(chunks) if chunks else np.empty(0, "<u2")


def _decode_steps(state_L: Words, words: Words, frequencies: np.ndarray[Any, Any], steps: int) -> Bytes:
    """Symbols [S, L]; `state_L` becomes the start states."""
    symbol_of_slot = np.repeat(np.arange(256), frequencies)
    start = np.cumsum(frequencies) - frequencies
    frequency_of_slot = frequencies[symbol_of_slot].astype(np.uint32)
    offset_of_slot = (np.arange(2**PRECISION) - start[symbol_of_slot]).astype(np.uint32)
    mask, precision = np.uint32(2**PRECISION - 1), np.uint32(PRECISION)
    lowest, half = np.uint32(LOWEST), np.uint32(16)
    slot_SL = np.empty((steps, state_L.size), np.uint16)
    position = 0
    for step in range(steps):
        slot_L = state_L & mask
        slot_SL[step] = slot_L
        next_L = frequency_of_slot[slot_L] * (state_L >> precision) + offset_of_slot[slot_L]
        short = (next_L < lowest).nonzero()[0]
        if short.size:
            end = position + short.size
            if end > words.size:
                raise ValueError("rans: the words end too early")
            next_L[short] = (next_L[short] << half) | words[position:end]
            position = end
        state_L[:] = next_L
    if position != words.size:
        raise ValueError("rans: words are left over")
    return symbol_of_slot.astype(np.uint8)[slot_SL]


def _read_stream(reader: "_Reader", count: int) -> Bytes:
    lanes = lane_count(count)
    first, span = reader.byte(), reader.byte() + 1
    if first + span > 256:
        raise ValueError("rans: a symbol is above 255")
    frequencies = np.zeros(256, np.int64)
    frequencies[first : first + span] = [reader.varint() for _ in range(span)]
    if frequencies.sum() != 2**PRECISION:
        raise ValueError(f"rans: frequencies sum to {frequencies.sum()}, not {2**PRECISION}")
    words_size = reader.varint()
    state_L = np.frombuffer(reader.take(4 * lanes), "<u4").astype(np.uint32)
    words = np.frombuffer(reader.take(2 * words_size), "<u2").astype(np.uint32)
    if (state_L < LOWEST).any():
        raise ValueError("rans: a state is below its range")

    body = max(count - 2 * lanes, 0)
    symbols = _decode_steps(state_L, words, frequencies, -(-body // lanes)).ravel()[:body]
    tail_L2 = (state_L & np.uint32(LOWEST - 1)).astype("<u2").view(np.uint8)
    if (state_L >> np.uint32(16) != 1).any() or tail_L2[count - body :].any():
        raise ValueError("rans: the start states are not what an encoder starts from")
    return np.concatenate([symbols, tail_L2[: count - body]])


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
        rank = np.argsort(np.argsort(size, kind="stable"), kind="stable")
        for log2_classes in range(4):
            if 1 << log2_classes > len(lines):
                break
            classes = (rank << log2_classes) // len(lines)
            totals = np.zeros((1 << log2_classes, 256), np.int64)
            np.add.at(totals, classes, counts)
            bits = len(lines) * log2_classes + sum(_estimated_bits(total) for total in totals)
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


def _varint(value: int) -> bytes:
    """Seven bits a byte, least significant first, the high bit set on all but the last."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


@dataclass
class _Reader:
    """Bytes read in order; ValueError where there are none left."""

    data: bytes
    position: int = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ValueError(f"rans: {size} bytes are needed, {len(self.data) - self.position} are left")
        self.position += size
        return self.data[self.position - size : self.position]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = 0
        for place in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 127) << place
            if byte < 128:
                return value
        raise ValueError("rans: a number has too many digits")

    def finish(self) -> None:
        if self.position != len(self.data):
            raise ValueError(f"rans: {len(self.data) - self.position} bytes are left over")
