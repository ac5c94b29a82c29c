"""General-purpose codecs behind one interface: bytes to fewer bytes and back.

Decoding is told how much to expect. It never produces more than a little above that, whatever the data say (a
decompression bomb is cut off), and anything but exactly that is an error. Encoding the same bytes with the same
version of a library gives the same bytes.

zstd is Python's own from 3.14 on (`compression.zstd`), else the package `zstandard`; brotli is the package `brotli`.
"""

import importlib
import lzma
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

CURE: Final = 'pip install "trihybrid[compact]"'
# zstandard's decompressor has no bound on its output, so it is fed by the spoonful: a block of 4 bytes can expand to
# 128 KiB, hence one spoonful to 8 MiB at most.
_SPOON: Final = 256


@dataclass(frozen=True)
class Codec:
    """One codec.

    Attributes:
        name: as ledgers and recipes write it.
        encode: bytes -> bytes. ValueError when its package is missing.
        decode: (data, expected_size) -> bytes, exactly `expected_size` long. ValueError when the data are damaged, have
            another size decoded or bytes left over, or when its package is missing.
    """

    name: str
    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes, int], bytes]


def byte_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        ValueError: no codec has it.
    """
    if name not in CODECS:
        raise ValueError(f'codec "{name}" is unknown; expected one of {", ".join(CODECS)}')
    return CODECS[name]


def missing_codecs() -> dict[str, str]:
    """Codecs that cannot be used here, and why."""
    missing = {}
    for name in CODECS:
        try:
            CODECS[name].encode(b"")
        except ValueError as error:
            missing[name] = str(error)
    return missing


def _exact(output: bytes, expected_size: int, finished: bool, left_over: bool) -> bytes:
    if len(output) > expected_size:
        raise ValueError(f"the data decode to more than the expected {expected_size} bytes")
    if not finished or len(output) < expected_size:
        raise ValueError(f"the data decode to {len(output)} bytes, expected {expected_size}")
    if left_over:
        raise ValueError("bytes are left over after the end of the compressed data")
    return output


def _stored_decode(data: bytes, expected_size: int) -> bytes:
    return _exact(data, expected_size, finished=True, left_over=False)


def _zlib_encode(data: bytes) -> bytes:
    return zlib.compress(data, 9)


def _zlib_decode(data: bytes, expected_size: int) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        output = decompressor.decompress(data, expected_size + 1)
    except zlib.error as error:
        raise ValueError(f"the zlib data are damaged ({error})") from None
    return _exact(output, expected_size, decompressor.eof, bool(decompressor.unused_data))


def _lzma_filters(size: int) -> list[dict[str, Any]]:
    """LZMA2 without container. Weights are noise with a skewed histogram: no literal context pays (lc = lp = pb = 0).
    The dictionary is the data's size to the next power of two, and the decoder, which allocates it, sets it itself."""
    dictionary = min(max(1 << (size - 1).bit_length(), 2**12), 2**26) if size else 2**12
    return [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9 | lzma.PRESET_EXTREME,
            "lc": 0,
            "lp": 0,
            "pb": 0,
            "dict_size": dictionary,
        }
    ]


def _lzma_encode(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_lzma_filters(len(data)))


def _lzma_decode(data: bytes, expected_size: int) -> bytes:
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_lzma_filters(expected_size))
    try:
        output = decompressor.decompress(data, expected_size + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"the lzma data are damaged ({error})") from None
    return _exact(output, expected_size, decompressor.eof, bool(decompressor.unused_data))


def _module(name: str, codec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f'codec "{codec}" needs the package {name}, which is not installed; {CURE}'
        ) from None


def _zstd_encode(data: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        return bytes(_module("compression.zstd", "zstd").compress(data, level=22))
    return bytes(_module("zstandard", "zstd").ZstdCompressor(level=22).compress(data))


def _zstd_decode(data: bytes, expected_size: int) -> bytes:
    # A frame asks for a window, which is allocated; none needs more than the data.
    window_log = max(10, (expected_size - 1).bit_length()) if expected_size else 10
    if sys.version_info >= (3, 14):
        return _zstd_decode_builtin(_module("compression.zstd", "zstd"), data, expected_size, window_log)
    zstandard = _module("zstandard", "zstd")
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << window_log).decompressobj()
    pieces, size, position = [], 0, 0
    try:
        while position < len(data) and size <= expected_size and not decompressor.eof:
            pieces.append(decompressor.decompress(data[position : position + _SPOON]))
            size += len(pieces[-1])
            position += _SPOON
    except zstandard.ZstdError as error:
        raise ValueError(f"the zstd data are damaged ({error})") from None
    left_over = bool(decompressor.unused_data) or position < len(data)
    return _exact(b"".join(pieces), expected_size, decompressor.eof, left_over)


def _zstd_decode_builtin(zstd: ModuleType, data: bytes, expected_size: int, window_log: int) -> bytes:
    options = {zstd.DecompressionParameter.window_log_max: window_log}
    decompressor = zstd.ZstdDecompressor(options=options)
    try:
        output = decompressor.decompress(data, expected_size + 1)
    except zstd.ZstdError as error:
        raise ValueError(f"the zstd data are damaged ({error})") from None
    return _exact(output, expected_size, decompressor.eof, bool(decompressor.unused_data))


def _brotli() -> ModuleType:
    brotli = _module("brotli", "brotli")
    # What this one wrote, it could not read back.
    if not hasattr(brotli.Decompressor, "can_accept_more_data"):
        raise ValueError(f"codec brotli needs brotli 1.2, which can bound what it decodes; {CURE}")
    return brotli


def _brotli_encode(data: bytes) -> bytes:
    return bytes(_brotli().compress(data, quality=11, lgwin=24))


def _brotli_decode(data: bytes, expected_size: int) -> bytes:
    brotli = _brotli()
    decompressor = brotli.Decompressor()
    try:
        pieces = [decompressor.process(data, output_buffer_limit=expected_size + 1)]
        size = len(pieces[0])
        while size <= expected_size and not decompressor.can_accept_more_data():
            pieces.append(decompressor.process(b"", output_buffer_limit=expected_size + 1 - size))
            size += len(pieces[-1])
    except brotli.error as error:
        raise ValueError(f"the brotli data are damaged ({error})") from None
    return _exact(b"".join(pieces), expected_size, decompressor.is_finished(), left_over=False)


CODECS: Final = {
    codec.name: codec
    for codec in (
        Codec("stored", bytes, _stored_decode),
        Codec("zlib", _zlib_encode, _zlib_decode),
        Codec("lzma", _lzma_encode, _lzma_decode),
        Codec("zstd", _zstd_encode, _zstd_decode),
        Codec("brotli", _brotli_encode, _brotli_decode),
    )
}
