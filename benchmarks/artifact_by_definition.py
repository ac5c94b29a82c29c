"""Artifacts by the definition of the format: each codec in a few slow lines, to hold the package's reader against.

Nothing here is safe on hostile bytes or shared with the package.
"""

import functools
import hashlib
import json
import lzma
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

HEADER_BYTES = 48


@functools.lru_cache(maxsize=16)
def decode_simply(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """(JSON of the ledger, values) of a file by the definition of the format; fails on most that is not valid."""
    magic, version, length, digest = struct.unpack("<8sII32s", data[:HEADER_BYTES])
    text = data[HEADER_BYTES : HEADER_BYTES + length]
    fields = json.loads(text)
    assert (magic, version, digest) == (b"TRIHYBRD", 1, hashlib.sha256(text).digest())
    position = HEADER_BYTES + length
    assert fields["header_bytes"] == HEADER_BYTES and fields["ledger_bytes"] == length
    assert fields["tensor_bytes"] == len(data) - position and fields["file_bytes"] == len(data)
    assert fields["total_bytes"] == len(data) + fields["code_bytes"]

    def matrix(part: dict[str, Any], rows: int, columns: int, bits: int) -> Any:
        nonlocal position
        assert part["offset"] == position - HEADER_BYTES - length
        encoded = data[position : position + part["bytes"]]
        position += part["bytes"]
        assert hashlib.sha256(encoded).hexdigest() == part["sha256"]
        decoded = SIMPLE_DECODERS[part["codec"]](encoded, rows, columns, bits)
        return np.frombuffer(bytes(decoded), np.int8).reshape(rows, columns)

    values = {}
    for entry in fields["tensors"]:
        elements = math.prod(entry["shape"])
        if entry["kind"] == "quantised":
            integers = matrix(entry["values"], *entry["shape"], entry["bits"])
            scales = matrix(entry["scales"], 2, entry["shape"][0], 8).T.copy().view("<f2").astype("f4")
            assert np.isfinite(scales).all() and (scales >= 0).all()
            assert (integers >> (entry["bits"] - 1) == np.where(integers < 0, -1, 0)).all()
            value = integers.astype("f4") * scales
        else:
            width = {"float16": 2, "float32": 4}[entry["dtype"]]
            value = matrix(entry["values"], width, elements, 8).T.copy().view(f"<f{width}").astype("f4")
            value = value.reshape(entry["shape"])
        assert np.isfinite(value).all() and entry["name"] not in values
        values[entry["name"]] = value
    assert position == len(data)
    return text, values


def simple_packed(data: bytes, rows: int, columns: int, bits: int) -> bytes:
    """Packed integers as one large number."""
    number = int.from_bytes(data, "little")
    low = 2 ** (bits - 1)
    return bytes(((number >> n * bits) % 2**bits - low) & 255 for n in range(rows * columns))


def simple_rans(data: bytes, rows: int, columns: int, bits: int) -> bytes:
    """A rans matrix, one symbol after the other, by the formula."""
    position = 1

    def varint() -> int:
        nonlocal position
        value = place = 0
        while True:
            position += 1
            value |= (data[position - 1] & 127) << place
            if data[position - 1] < 128:
                return value
            place += 7

    log2_classes = data[0] % 4
    if data[0] & 4:
        rows, columns = columns, rows
    classes = [0] * rows
    if log2_classes:
        packed = int.from_bytes(data[1 : 1 + (rows * log2_classes + 7) // 8], "little")
        classes = [(packed >> n * log2_classes) % 2**log2_classes for n in range(rows)]
        position += (rows * log2_classes + 7) // 8
    lines: dict[int, bytes] = {}
    for number in range(2**log2_classes):
        members = [row for row in range(rows) if classes[row] == number]
        count = len(members) * columns
        lanes = min(max(count // 2048, 1), 2048)
        first, span = data[position], data[position + 1] + 1
        position += 2
        frequencies = [varint() for _ in range(span)]
        assert sum(frequencies) == 2**14
        words_size = varint()
        states = list(struct.unpack_from(f"<{lanes}I", data, position))
        words = iter(struct.unpack_from(f"<{words_size}H", data, position + 4 * lanes))
        position += 4 * lanes + 2 * words_size
        slots = []
        for s, frequency in enumerate(frequencies):
            slots += [(first + s, len(slots), frequency)] * frequency
        symbols = []
        body = max(count - 2 * lanes, 0)
        for n in range(-(-body // lanes) * lanes):
            state = states[n % lanes]
            symbol, start, frequency = slots[state % 2**14]
            state = frequency * (state >> 14) + state % 2**14 - start
            states[n % lanes] = state if state >= 2**16 else state << 16 | next(words)
            symbols.append(symbol)
        assert next(words, None) is None and all(state >> 16 == 1 for state in states)
        tail = b"".join(struct.pack("<H", state & 0xFFFF) for state in states)
        whole = bytes(symbols[:body]) + tail[: count - body]
        for n, row in enumerate(members):
            lines[row] = whole[n * columns : (n + 1) * columns]
    assert position == len(data)
    symbols = [(symbol - 128) & 255 for row in range(rows) for symbol in lines[row]]
    if data[0] & 4:
        symbols = [symbols[row * columns + column] for column in range(columns) for row in range(rows)]
    return bytes(symbols)


def simple_module(name: str) -> Callable[..., bytes]:
    """The one-shot decoder of an optional library."""

    def decode(data: bytes, rows: int, columns: int, bits: int) -> bytes:
        if name == "brotli":
            import brotli

            return bytes(brotli.decompress(data))
        import zstandard

        return zstandard.ZstdDecompressor().decompress(data, max_output_size=rows * columns)

    return decode


SIMPLE_LZMA = [{"id": lzma.FILTER_LZMA2, "lc": 0, "lp": 0, "pb": 0, "dict_size": 2**23}]
SIMPLE_DECODERS: dict[str, Callable[[bytes, int, int, int], bytes]] = {
    "packed": simple_packed,
    "rans": simple_rans,
    "stored": lambda data, *_: data,
    "zlib": lambda data, *_: zlib.decompress(data),
    "lzma": lambda data, *_: lzma.decompress(data, lzma.FORMAT_RAW, filters=SIMPLE_LZMA),
    "zstd": simple_module("zstd"),
    "brotli": simple_module("brotli"),
}
