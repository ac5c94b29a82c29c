"""The bytes of an artifact, with numpy alone: each tensor through the codec that makes it smallest, and back.

Every part is a matrix of bytes before it is encoded: integers as they are (int8 [R, C]); floating-point values as
byte planes, [2, N] for float16 and [4, N] for float32, since their high bytes repeat and their low bytes do not.
R rows, C columns.
"""

import hashlib
import logging
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from trihybrid.compress.rans import CodedMatrix, decode_together, encode_matrices

logger = logging.getLogger(__name__)

CODEC_NAMES: Final[tuple[CodecName, ...]] = ("packed", "rans", "stored", "zlib", "lzma", "zstd", "brotli")
STORED: Final[dict[str, np.dtype[Any]]] = {
    "int8": np.dtype("int8"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
DECODED_TOGETHER: Final = 2**24
"""Elements of tensors whose parts are held and decoded at a time."""

Array = np.ndarray[Any, Any]
Int8 = np.ndarray[Any, np.dtype[np.int8]]
Entry = QuantisedEntry | PlainEntry


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

    matrices: list[tuple[Int8, int | None]] = []
    for tensor in tensors:
        matrices.append((_to_matrix(tensor.values), tensor.bits))
        if tensor.scales_R is not None:
            matrices.append((_to_matrix(tensor.scales_R), None))
    encoded = _encode_parts(matrices, codecs)
    parts, offset = [], 0
    for name, data in encoded:
        digest = hashlib.sha256(data).hexdigest()
        parts.append(Part(bytes=len(data), codec=name, offset=offset, sha256=digest))
        offset += len(data)
    waiting = iter(parts)
    ledger, head = make_ledger([_entry(tensor, waiting) for tensor in tensors], configuration, code_bytes)
    return ledger, [head, *(data for _, data in encoded)]


def read_container(
    path: str | Path, limit_elements: int = MOST_ELEMENTS
) -> tuple[Ledger, dict[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """The ledger and the values, float32, of a file that may be damaged or hostile.

    Memory stays near 4 bytes for every element and the bytes of the largest tensor, or of `DECODED_TOGETHER` elements,
    a few times over; `limit_elements` bounds both before anything is allocated. A part is hashed before it is decoded.

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
    for group in _groups(ledger.tensors):
        coded = {}
        for entry in group:
            with _naming(entry):
                coded[entry.name] = _read_parts(entry, file)
        # Streams of rans are decoded side by side.
        decode_together(part for parts in coded.values() for part in parts if isinstance(part, CodedMatrix))
        for entry in group:
            with _naming(entry):
                tensors[entry.name] = _values(entry, [_matrix(part) for part in coded.pop(entry.name)])
    return ledger, tensors


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Neighbours of at most `DECODED_TOGETHER` elements, or one entry."""
    group: list[Entry] = []
    held = 0
    for entry in entries:
        size = math.prod(entry.shape)
        if group and held + size > DECODED_TOGETHER:
            yield group
            group, held = [], 0
        group.append(entry)
        held += size
    yield group


@contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f'tensor "{entry.name}": {error}') from None


def _read_parts(entry: Entry, file: BinaryIO) -> list[Int8 | CodedMatrix]:
    """The parts' matrices, those of rans not decoded yet."""
    if isinstance(entry, PlainEntry):
        return [_read_matrix(file, entry.values, STORED[entry.dtype].itemsize, math.prod(entry.shape), None)]
    rows, columns = entry.shape
    return [
        _read_matrix(file, entry.values, rows, columns, entry.bits),
        _read_matrix(file, entry.scales, STORED["float16"].itemsize, rows, None),
    ]


def _read_matrix(file: BinaryIO, part: Part, rows: int, columns: int, bits: int | None) -> Int8 | CodedMatrix:
    data = _read_part(file, part, rows * columns)
    if part.codec == "rans":
        return CodedMatrix(data, rows, columns)
    return _decode_matrix(data, part.codec, rows, columns, bits)


def _matrix(part: Int8 | CodedMatrix) -> Int8:
    return part.matrix() if isinstance(part, CodedMatrix) else part


def _values(entry: Entry, parts: list[Int8]) -> np.ndarray[Any, np.dtype[np.float32]]:
    if isinstance(entry, PlainEntry):
        return _from_planes(parts[0], entry.dtype).reshape(entry.shape)
    integers_RC, scales_R = parts[0], _from_planes(parts[1], "float16")
    half = 2 ** (entry.bits - 1)
    if int(integers_RC.min()) < -half or int(integers_RC.max()) >= half:
        raise ValueError(f"an integer is outside the range of {entry.bits} bits")
    if (scales_R < 0).any():
        raise ValueError("a scale is negative")
    values_RC = integers_RC.astype(np.float32)
    values_RC *= scales_R[:, None]
    return values_RC


def _from_planes(planes: Int8, dtype: Literal["float16", "float32"]) -> np.ndarray[Any, np.dtype[np.float32]]:
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


def _encode_parts(
    matrices: Sequence[tuple[Int8, int | None]], codecs: Sequence[CodecName]
) -> list[tuple[CodecName, bytes]]:
    """Each matrix, of integers of so many bits or of other bytes, by the codec that makes it smallest."""
    choices: list[list[CodecName]] = []
    for _, bits in matrices:
        packable = bits is not None and bits < 8
        choices.append([name for name in codecs if packable or name != "packed"] or ["stored"])
    # The other codecs let go of the interpreter while they work.
    with ThreadPoolExecutor() as pool:
        jobs = [
            {name: pool.submit(_encode_matrix, *matrix, name) for name in names if name != "rans"}
            for matrix, names in zip(matrices, choices, strict=True)
        ]
        coded = encode_matrices([matrix_RC for matrix_RC, _ in matrices]) if "rans" in codecs else []
    smallest = []
    for number, names in enumerate(choices):
        encoded = [(name, coded[number] if name == "rans" else jobs[number][name].result()) for name in names]
        smallest.append(min(encoded, key=lambda pair: len(pair[1])))
    return smallest


def _encode_matrix(matrix_RC: Int8, bits: int | None, codec: CodecName) -> bytes:
    if codec == "packed" and bits is not None:
        return pack((matrix_RC.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8).ravel(), bits)
    return byte_codec(codec).encode(matrix_RC.tobytes())


def _decode_matrix(data: bytes, codec: CodecName, rows: int, columns: int, bits: int | None) -> Int8:
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


def _entry(tensor: StoredTensor, parts: Iterator[Part]) -> Entry:
    """The ledger's line of a tensor, with the next parts."""
    shape = list(tensor.values.shape)
    if tensor.bits is None:
        dtype = cast(Literal["float16", "float32"], tensor.values.dtype.name)
        return PlainEntry(kind="plain", name=tensor.name, shape=shape, dtype=dtype, values=next(parts))
    return QuantisedEntry(
        kind="quantised",
        name=tensor.name,
        shape=shape,
        dtype="int8",
        bits=tensor.bits,
        values=next(parts),
        scales=next(parts),
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
