"""True b-bit packing: small integers side by side in a stream of bits, least significant bit first, no padding
but the last byte's."""

from typing import Any, Final

import numpy as np

# Values a round: unpacked bits take one byte each, so memory stays at 8 MiB. A multiple of 8, so rounds end on bytes.
_ROUND: Final = 2**20


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


def pack(values_N: np.ndarray[Any, np.dtype[np.uint8]], bits: int) -> bytes:
    """Values as a stream of bits: value n holds bits n * bits to (n + 1) * bits - 1, little-endian.

    Args:
        values_N: uint8 [N], each below 2**bits.
        bits: 1..8.

    Raises:
        ValueError: `bits` out of range, or a value that does not fit.
    """
    _check_bits(bits)
    if values_N.size and int(values_N.max()) >> bits:
        raise ValueError(f"a value of {int(values_N.max())} does not fit {bits} bits")
    rounds = [
        np.packbits(
            np.unpackbits(values_N[start : start + _ROUND, None], axis=1, bitorder="little")[:, :bits],
            bitorder="little",
        ).tobytes()
        for start in range(0, values_N.size, _ROUND)
    ]
    return b"".join(rounds)


def unpack(data: bytes, bits: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The inverse of `pack`: uint8 [count].

    Raises:
        ValueError: `bits` out of range, `data` not exactly `packed_bytes(count, bits)` long, or set bits after the
            last value.
    """
    _check_bits(bits)
    if count < 0 or len(data) != packed_bytes(count, bits):
        raise ValueError(
            f"{count} values of {bits} bits take {packed_bytes(count, bits)} bytes, not {len(data)}"
        )
    if count and data[-1] >> ((count * bits - 1) % 8 + 1):
        raise ValueError("bits are set after the last packed value")
    values_N = np.empty(count, np.uint8)
    stream = np.frombuffer(data, np.uint8)
    for start in range(0, count, _ROUND):
        size = min(_ROUND, count - start)
        first = start * bits // 8
        round_bits = np.unpackbits(
            stream[first : first + packed_bytes(size, bits)], count=size * bits, bitorder="little"
        )
        values_N[start : start + size] = np.packbits(
            round_bits.reshape(size, bits), axis=1, bitorder="little"
        )[:, 0]
    return values_N


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}, expected 1 to 8")
