"""The bytes of an artifact, with numpy alone: each tensor through the codec that makes it smallest, and back.

Every part is a matrix of bytes before it is encoded: integers as they are (int8 [R, C]); floating-point values as
byte planes, [2, N] for float16 and [4, N] for float32, since their high bytes repeat and their low bytes do not.
R rows, C columns.
"""

import hashlib
import logging
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, cast

import numpy as np

from trihybrid.compress.codec import byte_codec, missing_codecs
from trihybrid.compress.ledger import (
    FORMAT,
    HEADER,
    MAGIC,
    MOST_ELEMENTS,
    MOST_LEDGER_BYTES,
    NAME,
    CodecName,
    Ledger,
    Part,
    PlainEntry,
    QuantisedEntry,
    make_ledger,
    parse_ledger,
)
from trihybrid.compress.packing import pack, unpack
from trihybrid.compress.rans import decode_matrix, encode_matrix

logger = logging.getLogger(__name__)

CODEC_NAMES: Final[tuple[CodecName, ...]] = ("packed", "rans", "stored", "zlib", "lzma", "zstd", "brotli")
STORED: Final[dict[str, np.dtype[Any]]] = {
    "int8": np.dtype("int8"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
Array = np.ndarray[Any, Any]
Int8 = np.ndarray[Any, np.dtype[np.int8]]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it is stored.

    Attributes:
        name: of the model's parameter.
        values: int8 [R, C] with scales, else float16 or float32 of any shape.
        scales_R: float16 [R]; None for plain values.
        bits: range of the integers; None for plain values.
    """

    name: str
    values: Array
    scales_R: Array | None = None
    bits: int | None = None


def encode_container(
    tensors: Sequence[StoredTensor], configuration: dict[str, Any], code_bytes: int, codec: str
) -> tuple[Ledger, list[bytes]]:
    """The ledger and the file as pieces, in order. The same input gives the same bytes.

    Args:
        tensors: what to store, in the order of the file.
        configuration: JSON object for the ledger.
        code_bytes: what the code beside the file takes, >= 0.
        codec: "smallest" tries all that are installed on each part; a name takes that one. Where "packed" cannot be
            (8 bits, floating-point values), bytes are stored as they are.

    Raises:
        ValueError: an unknown codec or one that is not installed; what `make_ledger` refuses.
    """
    codecs = _choice(codec)
    _check_names([tensor.name for tensor in tensors])

    def encode(tensor: StoredTensor) -> list[tuple[CodecName, bytes]]:
        parts = [_encode_part(_to_matrix(tensor.values), tensor.bits, codecs)]
        if tensor.scales_R is not None:
            parts.append(_encode_part(_to_matrix(tensor.scales_R), None, codecs))
        return parts

    # The codecs let go of the interpreter while they work.
    with ThreadPoolExecutor() as pool:
        encoded = list(pool.map(encode, tensors))
    entries: list[QuantisedEntry | PlainEntry] = []
    offset = 0
    for tensor, pieces in zip(tensors, encoded, strict=True):
        parts = []
        for name, data in pieces:
            digest = hashlib.sha256(data).hexdigest()
            parts.append(Part(bytes=len(data), codec=name, offset=offset, sha256=digest))
            offset += len(data)
        entries.append(_entry(tensor, parts))
    ledger, head = make_ledger(entries, configuration, code_bytes)
    return ledger, [head, *(data for pieces in encoded for _, data in pieces)]


def read_container(
    path: str | Path, limit_elements: int = MOST_ELEMENTS
) -> tuple[Ledger, dict[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """The ledger and the values, float32, of a file that may be damaged or hostile.

    Memory stays near 4 bytes for every element and the largest part's bytes a few times over; `limit_elements` bounds
    both before anything is allocated. A part is hashed before it is decoded.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        with Path(path).open("rb") as file:
            return _read(file, file.seek(0, 2), limit_elements)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    except MemoryError:
        raise ValueError(f"{path}: its tensors need more memory than there is") from None


def _read(
    file: BinaryIO, size: int, limit_elements: int
) -> tuple[Ledger, dict[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    file.seek(0)
    header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError("not an artifact of trihybrid")
    _, version, length, digest = HEADER.unpack(header)
    if version != FORMAT:
        raise ValueError(f"format {version}, this version reads format {FORMAT}")
    if length > min(MOST_LEDGER_BYTES, size - HEADER.size):
        raise ValueError(f"the header announces a ledger of {length} bytes; the file is cut short or damaged")
    text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("the sha256 of the ledger is wrong; the file is damaged")
    ledger = parse_ledger(text)
    if ledger.ledger_bytes != length:
        raise ValueError(f"ledger_bytes is {ledger.ledger_bytes}, the header announces {length}")
    ledger.check(size, limit_elements)
    tensors = {}
    for entry in ledger.tensors:
        try:
            tensors[entry.name] = _decode(entry, file)
        except ValueError as error:
            raise ValueError(f'tensor "{entry.name}": {error}') from None
    return ledger, tensors


def _decode(entry: QuantisedEntry | PlainEntry, file: BinaryIO) -> np.ndarray[Any, np.dtype[np.float32]]:
    if isinstance(entry, PlainEntry):
        values = _read_values(file, entry.values, entry.dtype, math.prod(entry.shape))
        return values.reshape(entry.shape)
    rows, columns = entry.shape
    integers_RC = _decode_matrix(
        _read_part(file, entry.values, rows * columns), entry.values.codec, rows, columns, entry.bits
    )
    scales_R = _read_values(file, entry.scales, "float16", rows)
    half = 2 ** (entry.bits - 1)
    if int(integers_RC.min()) < -half or int(integers_RC.max()) >= half:
        raise ValueError(f"an integer is outside the range of {entry.bits} bits")
    if (scales_R < 0).any():
        raise ValueError("a scale is negative")
    values_RC = integers_RC.astype(np.float32)
    values_RC *= scales_R[:, None]
    return values_RC


def _read_values(
    file: BinaryIO, part: Part, dtype: Literal["float16", "float32"], count: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    width = STORED[dtype].itemsize
    planes = _decode_matrix(_read_part(file, part, width * count), part.codec, width, count, None)
    values = np.ascontiguousarray(planes.T).view(STORED[dtype]).ravel().astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a value is NaN or infinite")
    return values


def _read_part(file: BinaryIO, part: Part, decoded_size: int) -> bytes:
    # No codec here makes anything twice as large, small parts aside.
    if part.bytes > 2 * decoded_size + 4096:
        raise ValueError(f"{part.bytes} bytes for a part of {decoded_size}")
    data = file.read(part.bytes)
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise ValueError("the sha256 is wrong; the file is damaged")
    return data


def _encode_part(matrix_RC: Int8, bits: int | None, codecs: Sequence[CodecName]) -> tuple[CodecName, bytes]:
    packable = bits is not None and bits < 8
    usable: list[CodecName] = [name for name in codecs if packable or name != "packed"] or ["stored"]
    encoded = [(name, _encode_matrix(matrix_RC, name, bits)) for name in usable]
    return min(encoded, key=lambda pair: len(pair[1]))


def _encode_matrix(matrix_RC: Int8, codec: CodecName, bits: int | None) -> bytes:
    if codec == "rans":
        return encode_matrix(matrix_RC)
    if codec == "packed" and bits is not None:
        return pack((matrix_RC.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8).ravel(), bits)
    return byte_codec(codec).encode(matrix_RC.tobytes())


def _decode_matrix(data: bytes, codec: CodecName, rows: int, columns: int, bits: int | None) -> Int8:
    if codec == "rans":
        return decode_matrix(data, rows, columns)
    if codec == "packed":
        if bits is None or bits > 7:
            raise ValueError("packed bytes of what cannot be packed")
        values = unpack(data, bits, rows * columns).astype(np.int16) - 2 ** (bits - 1)
        return values.astype(np.int8).reshape(rows, columns)
    return np.frombuffer(byte_codec(codec).decode(data, rows * columns), np.int8).reshape(rows, columns)


def _to_matrix(values: Array) -> Int8:
    if values.dtype == np.int8:
        return values
    stored = np.ascontiguousarray(values, STORED[values.dtype.name]).reshape(-1)
    return np.ascontiguousarray(stored.view(np.int8).reshape(stored.size, -1).T)


def _entry(tensor: StoredTensor, parts: list[Part]) -> QuantisedEntry | PlainEntry:
    shape = list(tensor.values.shape)
    if tensor.bits is None:
        dtype = cast(Literal["float16", "float32"], tensor.values.dtype.name)
        return PlainEntry(kind="plain", name=tensor.name, shape=shape, dtype=dtype, values=parts[0])
    return QuantisedEntry(
        kind="quantised",
        name=tensor.name,
        shape=shape,
        dtype="int8",
        bits=tensor.bits,
        values=parts[0],
        scales=parts[1],
    )


def _check_names(names: Sequence[str]) -> None:
    """Before the work, what the ledger would refuse after it."""
    for name in names:
        if not re.fullmatch(NAME, name):
            raise ValueError(f'tensor "{name}": a name is 1 to 255 printable ASCII characters without spaces')
    if len(set(names)) < len(names):
        raise ValueError(f'tensor "{max(names, key=names.count)}" is there twice')


def _choice(codec: str) -> Sequence[CodecName]:
    if codec == "smallest":
        missing = missing_codecs()
        for name, reason in missing.items():
            logger.warning("%s is not tried: %s", name, reason)
        return [name for name in CODEC_NAMES if name not in missing]
    if codec not in CODEC_NAMES:
        raise ValueError(f'codec is "{codec}", expected smallest or one of {", ".join(CODEC_NAMES)}')
    return [codec]
