"""A static entropy coder of bytes: interleaved rANS, whose lanes, those of many streams, step together in numpy.

J. Duda, "Asymmetric numeral systems" (arXiv:1311.2540); interleaving after F. Giesen (arXiv:1402.3392).

One stream codes symbols 0..255 with one table of frequencies f (they sum to 2**14; c is their running sum). A lane's
state x lies in [2**16, 2**32). Coding symbol s maps x to (x // f_s) 2**14 + x mod f_s + c_s, after its low 16 bits
went to the stream where the result would not fit; coding runs from the last symbol to the first, decoding the other
way. Symbol n belongs to lane n mod L, so that L lanes step at once. A start state is the coder's to choose: its low 16
bits hold two of the last symbols, which pays for part of a lane's 4 bytes.

A numpy call costs as much as some thousand lanes, and a stream of weights has some hundred. So the lanes of many
streams step side by side; the bytes of each are what they would be alone.

Stream: first symbol u8, symbols - 1 u8, a frequency each (varint), number of words (varint), L states u32, words u16.
All little-endian. Shapes: N symbols, S steps, L lanes, K streams.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np

PRECISION: Final = 14
LOWEST: Final = 2**16
SYMBOLS_PER_LANE: Final = 2048
MOST_LANES: Final = 2048
# Enough for a step over all lanes to cost more than calling numpy, little enough for memory.
MOST_TOGETHER: Final = 2**23

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Shorts = np.ndarray[Any, np.dtype[np.uint16]]
Words = np.ndarray[Any, np.dtype[np.uint32]]
Integers = np.ndarray[Any, np.dtype[np.int64]]


def lane_count(count: int) -> int:
    """Lanes of a stream of `count` symbols: one for every 2,048, from 1 to 2,048."""
    return min(max(count // SYMBOLS_PER_LANE, 1), MOST_LANES)


def body_steps(count: int) -> int:
    """Steps of a stream of `count` symbols, the last of which are in the start states."""
    lanes = lane_count(count)
    return -(-max(count - 2 * lanes, 0) // lanes)


def encode_stream(symbols_N: Bytes) -> bytes:
    """Symbols 0..255, uint8 [N], as one stream."""
    return encode_streams([symbols_N])[0]


def decode_stream(data: bytes, count: int) -> Bytes:
    """The inverse of `encode_stream`: uint8 [count].

    Raises:
        ValueError: the bytes are not a stream of that many symbols.
    """
    reader = Reader(data)
    stream = Stream.read(reader, count)
    reader.finish()
    decode_streams([stream])
    return stream.symbols()


def quantise_frequencies(counts: np.ndarray[Any, Any]) -> Integers:
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


@dataclass
class Stream:
    """A stream on its way back: `read`, then decoded by `decode_streams`, then `symbols`.

    Attributes:
        count: symbols in it.
        frequencies: the table, int64 [256].
        state_L: the encoder's last states, after decoding its first ones.
        words: what the encoder wrote.
        slot_SL: after decoding, each symbol's state modulo 2**14.
        unread: after decoding, words that are left over, below 0 where some were missing.
    """

    count: int
    frequencies: Integers
    state_L: Words
    words: Shorts
    slot_SL: Shorts | None = None
    unread: int = 0

    @classmethod
    def read(cls, reader: "Reader", count: int) -> Self:
        """The next stream, of `count` symbols. ValueError: the bytes do not begin with one."""
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
        words = np.frombuffer(reader.take(2 * words_size), "<u2")
        if (state_L < LOWEST).any():
            raise ValueError("rans: a state is below its range")
        return cls(count, frequencies, state_L, words)

    def symbols(self) -> Bytes:
        """uint8 [count], from the decoded slots and states. ValueError: not what an encoder wrote."""
        assert self.slot_SL is not None
        if self.unread:
            raise ValueError(f"rans: the words {'end too early' if self.unread < 0 else 'are left over'}")
        body = max(self.count - 2 * self.state_L.size, 0)
        tail_L2 = (self.state_L & np.uint32(LOWEST - 1)).astype("<u2").view(np.uint8)
        if (self.state_L >> np.uint32(16) != 1).any() or tail_L2[self.count - body :].any():
            raise ValueError("rans: the start states are not what an encoder starts from")
        symbol_of_slot = np.repeat(np.arange(256, dtype=np.uint8), self.frequencies)
        return np.concatenate([symbol_of_slot[self.slot_SL].ravel()[:body], tail_L2[: self.count - body]])


class _Lanes:
    """The lanes of many streams beside each other, those with the most steps first: at any step the lanes that still
    take part are the first ones.

    Attributes:
        order: numbers of the streams, from left to right.
        first_K1: the first lane of each stream in that order, and the number of all lanes.
        stream_L: place in that order, of the stream that each lane belongs to.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        steps = [body_steps(count) for count in counts]
        self.order = sorted(range(len(counts)), key=lambda number: -steps[number])
        self.steps = [steps[number] for number in self.order]
        lanes = [lane_count(counts[number]) for number in self.order]
        self.first_K1 = np.cumsum([0, *lanes])
        self.stream_L = np.repeat(np.arange(len(lanes)), lanes)

    def stretches(self) -> Iterator[tuple[range, int]]:
        """(steps, number of streams that take part in them), from step 0 on."""
        begin = 0
        for streams in range(len(self.steps), 0, -1):
            end = self.steps[streams - 1]
            if end > begin:
                yield range(begin, end), streams
                begin = end

    def place(self, place: int) -> slice:
        """The lanes of the stream at a place of the order."""
        return slice(self.first_K1[place], self.first_K1[place + 1])


def encode_streams(streams: Sequence[Bytes]) -> list[bytes]:
    """`encode_stream` of each."""
    groups = _groups([stream.size for stream in streams])
    return [encoded for group in groups for encoded in _encode_group(streams[group])]


def _encode_group(streams: Sequence[Bytes]) -> list[bytes]:
    lanes = _Lanes([stream.size for stream in streams])
    deepest, width = lanes.steps[0], int(lanes.first_K1[-1])
    body_SL = np.zeros((deepest, width), np.uint8)
    state_L = np.empty(width, np.uint32)
    tables = np.empty((len(streams), 256), np.int64)
    for place, number in enumerate(lanes.order):
        symbols_N, here = streams[number], lanes.place(place)
        count = here.stop - here.start
        body_N, tail_N = np.split(symbols_N, [max(symbols_N.size - 2 * count, 0)])
        counts = np.bincount(body_N, minlength=256)
        counts[0] += not body_N.size
        tables[place] = quantise_frequencies(counts)
        # The last step is filled up with the cheapest symbol, which nobody reads.
        padded = np.full(lanes.steps[place] * count, tables[place].argmax(), np.uint8)
        padded[: body_N.size] = body_N
        body_SL[: lanes.steps[place], here] = padded.reshape(-1, count)
        tail_L2 = np.zeros(2 * count, np.uint8)
        tail_L2[: tail_N.size] = tail_N
        state_L[here] = LOWEST + tail_L2.view("<u2").astype(np.uint32)
    word_SL, written_SL = _encode_steps(body_SL, tables, state_L, lanes)
    encoded = [b""] * len(streams)
    for place, number in enumerate(lanes.order):
        here, steps = lanes.place(place), lanes.steps[place]
        words = word_SL[:steps, here][written_SL[:steps, here]]
        present = np.flatnonzero(tables[place])
        first, last = int(present[0]), int(present[-1])
        encoded[number] = b"".join(
            (
                bytes([first, last - first]),
                *(_varint(int(frequency)) for frequency in tables[place, first : last + 1]),
                _varint(words.size),
                state_L[here].astype("<u4").tobytes(),
                words.astype("<u2").tobytes(),
            )
        )
    return encoded


def _encode_steps(
    body_SL: Bytes, tables_K256: Integers, state_L: Words, lanes: _Lanes
) -> tuple[Shorts, np.ndarray[Any, np.dtype[np.bool_]]]:
    """What each step writes, uint16 [S, L], and whether it does; `state_L` becomes the last states."""
    frequency_of = tables_K256.astype(np.uint32).ravel()
    start_of = (np.cumsum(tables_K256, 1) - tables_K256).astype(np.uint32).ravel()
    table_L = 256 * lanes.stream_L
    shift, half, whole = np.uint32(32 - PRECISION), np.uint32(16), np.uint32(2**PRECISION)
    word_SL = np.empty(body_SL.shape, np.uint16)
    written_SL = np.empty(body_SL.shape, np.bool_)
    for steps, streams in reversed(list(lanes.stretches())):
        active = int(lanes.first_K1[streams])
        for step in reversed(steps):
            state = state_L[:active]
            symbol = table_L[:active] + body_SL[step, :active]
            frequency = frequency_of[symbol]
            full = np.greater_equal(state >> shift, frequency, out=written_SL[step, :active])
            word_SL[step, :active] = state
            np.right_shift(state, half, out=state, where=full)
            # (x // f) 2**14 + x mod f + c
            state += (state // frequency) * (whole - frequency) + start_of[symbol]
    return word_SL, written_SL


def decode_streams(streams: Sequence[Stream]) -> None:
    """Decode each, once; damage shows when its `symbols` are asked for."""
    for group in _groups([stream.count for stream in streams]):
        _decode_group(streams[group])


def _decode_group(streams: Sequence[Stream]) -> None:
    lanes = _Lanes([stream.count for stream in streams])
    ordered = [streams[number] for number in lanes.order]
    slot_SL = np.empty((lanes.steps[0], lanes.stream_L.size), np.uint16)
    state_L = np.concatenate([stream.state_L for stream in ordered])
    # One more, so that there is something to read where nothing is left.
    words = np.concatenate([*(stream.words for stream in ordered), np.zeros(1, np.uint16)])
    begin_K1 = np.cumsum([0, *(stream.words.size for stream in ordered)])
    next_K = begin_K1[:-1].copy()
    _decode_steps(state_L, words, next_K, [stream.frequencies for stream in ordered], slot_SL, lanes)
    for place, stream in enumerate(ordered):
        here = lanes.place(place)
        stream.slot_SL = slot_SL[: lanes.steps[place], here]
        stream.state_L = state_L[here]
        stream.unread = int(begin_K1[place + 1] - next_K[place])


def _decode_steps(
    state_L: Words,
    words: Shorts,
    next_K: Integers,
    tables: Sequence[Integers],
    slot_SL: Shorts,
    lanes: _Lanes,
) -> None:
    """Fill `slot_SL`; `state_L` becomes the start states, and `next_K`, the first word of each stream, the one after
    its last, which lies beyond its words where the bytes are damaged."""
    frequency_of = np.empty(len(tables) << PRECISION, np.uint32)
    offset_of = np.empty_like(frequency_of)
    for number, counts in enumerate(tables):
        here = slice(number << PRECISION, number + 1 << PRECISION)
        frequency_of[here] = np.repeat(counts, counts)
        offset_of[here] = np.arange(2**PRECISION) - np.repeat(np.cumsum(counts) - counts, counts)
    table_L = (lanes.stream_L << PRECISION).astype(np.uint32)
    mask, precision = np.uint32(2**PRECISION - 1), np.uint32(PRECISION)
    lowest, half = np.uint32(LOWEST), np.uint32(16)
    for steps, streams in lanes.stretches():
        active = int(lanes.first_K1[streams])
        state, table = state_L[:active], table_L[:active]
        first_K1, next_k = lanes.first_K1[: streams + 1], next_K[:streams]
        for step in steps:
            slot = state & mask
            slot_SL[step, :active] = slot
            slot += table
            np.right_shift(state, precision, out=state)
            state *= frequency_of[slot]
            state += offset_of[slot]
            short = (state < lowest).nonzero()[0]
            edge_K1 = short.searchsorted(first_K1)
            taken_K = np.diff(edge_K1)
            place = np.arange(short.size) + np.repeat(next_k - edge_K1[:-1], taken_K)
            state[short] = (state[short] << half) | words.take(place, mode="clip")
            next_k += taken_K


def _groups(counts: Sequence[int]) -> Iterator[slice]:
    """Runs of streams that go together: by symbols and slots of their tables no more than `MOST_TOGETHER`, or one."""
    first = held = 0
    for number, count in enumerate(counts):
        size = count + 2**PRECISION
        if number > first and held + size > MOST_TOGETHER:
            yield slice(first, number)
            first, held = number, 0
        held += size
    if counts:
        yield slice(first, len(counts))


def _varint(value: int) -> bytes:
    """Seven bits a byte, least significant first, the high bit set on all but the last."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


@dataclass
class Reader:
    """Bytes read in order; ValueError where there are none left."""

    data: bytes
    position: int = 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > len(self.data) - self.position:
            raise ValueError(f"rans: {size} bytes are needed, {len(self.data) - self.position} are left")
        self.position += size
        return self.data[self.position - size : self.position]

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """The next number of `_varint`, at most five bytes of it."""
        value = 0
        for place in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 127) << place
            if byte < 128:
                return value
        raise ValueError("rans: a number has too many digits")

    def finish(self) -> None:
        """See that there is nothing left."""
        if self.position != len(self.data):
            raise ValueError(f"rans: {len(self.data) - self.position} bytes are left over")
