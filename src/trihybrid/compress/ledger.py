"""The ledger: the account, in an artifact, of all its bytes. Reading one trusts nothing in it.

The file is header, ledger, parts. The header is 48 bytes: magic, format version u32, length of the ledger u32
(little-endian), sha256 of the ledger. The ledger is canonical JSON (ASCII, sorted keys, no spaces). The parts, each
with its own sha256, follow in the order of the ledger without gaps.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAGIC: Final = b"TRIHYBRD"
FORMAT: Final = 1
HEADER: Final = struct.Struct("<8sII32s")
MOST_LEDGER_BYTES: Final = 2**20
MOST_TENSORS: Final = 4096
MOST_ELEMENTS: Final = 2**28
DEEPEST: Final = 16
NAME: Final = "[!-~]{1,255}"

Size = Annotated[int, Field(ge=0, le=2**40)]
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Dimension = Annotated[int, Field(ge=1, le=MOST_ELEMENTS)]
CodecName = Literal["packed", "rans", "stored", "zlib", "lzma", "zstd", "brotli"]


class Strict(BaseModel):
    """No unknown fields and no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Part(Strict):
    """One run of bytes after the ledger."""

    bytes: Annotated[int, Field(ge=1, le=2**40, description="length in the file")]
    codec: CodecName = Field(description="how it is encoded")
    offset: Size = Field(description="where it begins, counted from the end of the ledger")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="hash of the encoded bytes")


class QuantisedEntry(Strict):
    """An int8 matrix [R, C] and its float16 scales [R]."""

    kind: Literal["quantised"]
    name: Name = Field(description="name of the model's parameter")
    shape: Annotated[list[Dimension], Field(min_length=2, max_length=2, description="rows, columns")]
    dtype: Literal["int8"] = Field(description="how the integers are handed to the codec")
    bits: Annotated[int, Field(ge=2, le=8, description="range of the integers")]
    values: Part
    scales: Part

    @property
    def parts(self) -> list[Part]:
        """Its runs of bytes in the order of the file."""
        return [self.values, self.scales]


class PlainEntry(Strict):
    """A tensor of floating-point values."""

    kind: Literal["plain"]
    name: Name = Field(description="name of the model's parameter")
    shape: Annotated[list[Dimension], Field(max_length=8, description="[] for a scalar")]
    dtype: Literal["float16", "float32"] = Field(description="of the stored values")
    values: Part

    @property
    def parts(self) -> list[Part]:
        """Its runs of bytes in the order of the file."""
        return [self.values]


class Ledger(Strict):
    """The account of an artifact's bytes."""

    # A bounded int, since a Literal takes 1.0 and true for 1.
    format: Annotated[int, Field(ge=FORMAT, le=FORMAT, description="version of the layout")]
    configuration: dict[str, Any] = Field(description="what builds the model, as its writer chose")
    code_bytes: Annotated[int, Field(ge=0, le=2**32)] = Field(
        description="bytes of the code that goes with the file, not in it"
    )
    header_bytes: Annotated[int, Field(ge=HEADER.size, le=HEADER.size, description="length of the header")]
    ledger_bytes: Annotated[int, Field(ge=2, le=MOST_LEDGER_BYTES, description="length of this JSON")]
    tensor_bytes: Size = Field(description="length of all parts")
    file_bytes: Size = Field(description="header, ledger and parts")
    total_bytes: Size = Field(description="file and code: what a limit applies to")
    tensors: Annotated[
        list[Annotated[QuantisedEntry | PlainEntry, Field(discriminator="kind")]],
        Field(max_length=MOST_TENSORS),
    ]

    def check(self, file_size: int, limit_elements: int = MOST_ELEMENTS) -> None:
        """Hold the account against itself and the file.

        Args:
            file_size: bytes of the whole file.
            limit_elements: elements of all tensors together may not be more.

        Raises:
            ValueError: a name that comes twice, too many elements, a part that does not begin where the one before
                ends, or a sum that is wrong.
        """
        names: set[str] = set()
        elements = end = 0
        for entry in self.tensors:
            if entry.name in names:
                raise ValueError(f'tensor "{entry.name}" is there twice')
            names.add(entry.name)
            elements += math.prod(entry.shape)
            if elements > limit_elements:
                raise ValueError(f'with tensor "{entry.name}" there are more than {limit_elements} elements')
            for part in entry.parts:
                if part.offset != end:
                    raise ValueError(
                        f'a part of tensor "{entry.name}" is at offset {part.offset}, expected {end}'
                    )
                end += part.bytes
        file_bytes = self.header_bytes + self.ledger_bytes + end
        sums = {
            "tensor_bytes": end,
            "file_bytes": file_bytes,
            "total_bytes": file_bytes + self.code_bytes,
        }
        for field, wanted in sums.items():
            if getattr(self, field) != wanted:
                raise ValueError(f"{field} is {getattr(self, field)}, the parts add up to {wanted}")
        if file_bytes != file_size:
            raise ValueError(f"the file has {file_size} bytes, its ledger accounts for {file_bytes}")


def make_ledger(
    entries: list[QuantisedEntry | PlainEntry], configuration: dict[str, Any], code_bytes: int
) -> tuple[Ledger, bytes]:
    """The ledger of these tensors, and header and ledger as they stand in the file.

    Raises:
        ValueError: what cannot be read back: a configuration that is not JSON or too deep, names that are empty,
            doubled or not printable ASCII, too many tensors or elements.
    """
    tensor_bytes = sum(part.bytes for entry in entries for part in entry.parts)
    fields = {
        "format": FORMAT,
        "configuration": configuration,
        "code_bytes": code_bytes,
        "header_bytes": HEADER.size,
        "ledger_bytes": 0,
        "tensor_bytes": tensor_bytes,
        "file_bytes": 0,
        "total_bytes": 0,
        "tensors": [entry.model_dump() for entry in entries],
    }
    # The ledger holds its own length. A longer number never makes it shorter, so this climbs to a fixed point.
    length = 0
    while True:
        fields["ledger_bytes"] = length
        fields["file_bytes"] = HEADER.size + length + tensor_bytes
        fields["total_bytes"] = HEADER.size + length + tensor_bytes + code_bytes
        text = canonical_json(fields)
        if len(text) == length:
            break
        length = len(text)
    ledger = parse_ledger(text)
    ledger.check(HEADER.size + length + tensor_bytes)
    return ledger, HEADER.pack(MAGIC, FORMAT, length, hashlib.sha256(text).digest()) + text


def canonical_json(value: Any) -> bytes:
    """JSON in the one form that a ledger may have: ASCII, keys sorted, no spaces.

    Raises:
        ValueError: not JSON, NaN and infinity included.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    return text.encode("ascii")


def parse_ledger(text: bytes) -> Ledger:
    """A ledger from its JSON. `check` it before use.

    Raises:
        ValueError: too long, not canonical JSON, nested deeper than 16, or a field that is missing, unknown, of
            another type or out of range.
    """
    if len(text) > MOST_LEDGER_BYTES:
        raise ValueError(f"the ledger has {len(text)} bytes, at most {MOST_LEDGER_BYTES} are read")
    _check_depth(text)
    try:
        fields = json.loads(text.decode("ascii"), parse_constant=_refuse_constant)
        canonical = canonical_json(fields) == text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the ledger is not JSON ({error})") from None
    if not canonical:
        raise ValueError("the ledger is not in canonical form (ASCII, keys once and sorted, no spaces)")
    try:
        return Ledger.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:200]
        raise ValueError(f"ledger: {field or 'the whole'}: {first['msg']}") from None


def _check_depth(text: bytes) -> None:
    """Brackets outside strings, counted before a parser recurses into them."""
    depth = 0
    for bracket in re.finditer(rb"[\[\]{}]", re.sub(rb'"(?:[^"\\]|\\.)*+"', b"", text)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > DEEPEST:
            raise ValueError(f"the ledger is nested deeper than {DEEPEST}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


@dataclass(frozen=True)
class LedgerRow:
    """One line of the table that a command prints.

    Attributes:
        label: what the bytes are for.
        tensors, elements: how many; 0 for bytes that are not of tensors.
        bytes: encoded size.
    """

    label: str
    tensors: int
    elements: int
    bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        """Bits an element; None without elements."""
        return 8 * self.bytes / self.elements if self.elements else None


def ledger_rows(ledger: Ledger, roles: Mapping[str, str] | None = None) -> list[LedgerRow]:
    """The bytes by group: role (where `roles` names the tensor's), kind and bits, with scales on a line of their
    own; then header and ledger, code, total. All lines but the last add up to the last."""
    groups: dict[str, tuple[int, int, int]] = {}

    def add(label: str, tensors: int, elements: int, size: int) -> None:
        old = groups.get(label, (0, 0, 0))
        groups[label] = (old[0] + tensors, old[1] + elements, old[2] + size)

    for entry in ledger.tensors:
        storage = f"int{entry.bits}" if entry.kind == "quantised" else entry.dtype
        role = (roles or {}).get(entry.name)
        add(f"{role} {storage}" if role else storage, 1, math.prod(entry.shape), entry.values.bytes)
    for entry in ledger.tensors:
        if entry.kind == "quantised":
            add("scales float16", 1, entry.shape[0], entry.scales.bytes)
    rows = [LedgerRow(label, *numbers) for label, numbers in groups.items()]
    rows.sort(key=lambda row: -row.bytes)
    weights = sum(math.prod(entry.shape) for entry in ledger.tensors)
    return [
        *rows,
        LedgerRow("header and ledger", 0, 0, ledger.header_bytes + ledger.ledger_bytes),
        LedgerRow("code", 0, 0, ledger.code_bytes),
        LedgerRow("total", len(ledger.tensors), weights, ledger.total_bytes),
    ]
