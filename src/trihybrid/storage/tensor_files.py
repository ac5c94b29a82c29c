"""safetensors files as ranges of bytes: what a header says, and tensors or rows of them read one at a time.

Format: eight bytes with the length of the header, the header as JSON (name -> dtype, shape, begin and end), the bytes
of all tensors one after the other. Nothing is mapped into memory, so that reading a file of 10 GB needs as much as its
largest tensor that is asked for, or a few of its rows.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' name of a dtype -> torch's. Tensors of other dtypes can be copied, not read."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorRange:
    """Where one tensor lies: `length` bytes of `path` from byte `start` on, with safetensors' name of its dtype."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int

    @property
    def parts(self) -> tuple["TensorRange", ...]:
        """Itself, as `TensorJoin` has several."""
        return (self,)

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            ValueError: a dtype that we do not read, or a file that has become shorter.
        """
        return self._read(0, self.length).view(self._torch_dtype()).view(self.shape)

    def rows(self, rows_N: Tensor) -> Tensor:
        """Rows of the tensor, [N, ...], without reading the others. Raises as `read` does."""
        width = self.length // self.shape[0]
        found, place_N = torch.unique(rows_N.cpu(), return_inverse=True)
        read = [self._read(int(row) * width, width) for row in found]
        return torch.stack(read).view(self._torch_dtype()).view(len(read), *self.shape[1:])[place_N]

    def block(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, [stop - start, ...], as one range of bytes. Raises as `read` does."""
        width = self.length // self.shape[0]
        read = self._read(start * width, (stop - start) * width)
        return read.view(self._torch_dtype()).view(stop - start, *self.shape[1:])

    def _torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.path}: tensors of dtype {self.dtype} are not read; known: {', '.join(DTYPES)}"
            )
        return DTYPES[self.dtype]

    def _read(self, offset: int, length: int) -> Tensor:
        # Torch's own memory, which is aligned: of other addresses products may round otherwise.
        bytes_N = torch.empty(length, dtype=torch.uint8)
        with self.path.open("rb") as file:
            read_into(file.fileno(), bytes_N.numpy().data, self.start + offset, self.path)
        return bytes_N


@dataclass(frozen=True)
class TensorJoin:
    """Tensors of one dtype as one: the bytes of `parts`, one after the other, in a shape that they fill.

    Raises:
        ValueError: parts of several dtypes, or that do not fill the shape.
    """

    parts: tuple[TensorRange, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        first, elements = self.parts[0], sum(math.prod(part.shape) for part in self.parts)
        if any(part.dtype != first.dtype for part in self.parts) or elements != math.prod(self.shape):
            raise ValueError(
                f"{first.path}: {len(self.parts)} tensors, the first {list(first.shape)}, do not make one of "
                f"{list(self.shape)} in {first.dtype}"
            )

    @property
    def path(self) -> Path:
        """File of the first part, where `start` is."""
        return self.parts[0].path

    @property
    def start(self) -> int:
        return self.parts[0].start

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)

    def read(self) -> Tensor:
        """The tensor. Raises as that of `TensorRange`."""
        return torch.cat([part.read().flatten() for part in self.parts]).view(self.shape)

    def rows(self, rows_N: Tensor) -> Tensor:
        """Rows of it, [N, ...]."""
        return self.read()[rows_N.cpu()]


StoredTensor: TypeAlias = TensorRange | TensorJoin
"""A tensor that lies on the disk."""


def read_into(handle: int, space: memoryview, offset: int, path: Path) -> None:
    """Fill `space` from byte `offset` of an open file on.

    Raises:
        ValueError: the file ends before.
    """
    done = 0
    while done < len(space):
        count = os.preadv(handle, [space[done:]], offset + done)
        if not count:
            raise ValueError(f"{path}: ends at byte {offset + done}; it became shorter while it was read")
        done += count


def read_header(path: Path) -> dict[str, TensorRange]:
    """Name -> range of every tensor in a file whose size is what its header says.

    Raises:
        ValueError: not safetensors, tensors that overlap or leave gaps, or a file that is cut short or too long.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise ValueError(
                f"{path}: truncated: {size} bytes, its header alone needs {8 + length}; fetch it again"
            )
        try:
            entries = json.loads(file.read(length))
            ranges = {
                name: _range(path, fields, 8 + length)
                for name, fields in entries.items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, AttributeError, LookupError):
            raise ValueError(f"{path}: the header is not safetensors; fetch it again") from None
    needed = 8 + length
    for found in sorted(ranges.values(), key=lambda found: (found.start, found.length)):
        if found.start != needed:
            raise ValueError(
                f"{path}: the header is not safetensors, its tensors do not join; fetch it again"
            )
        needed += found.length
    if size != needed:
        raise ValueError(
            f"{path}: {size} bytes, its header describes {needed}; the file is cut short or damaged"
        )
    return ranges


def _range(path: Path, fields: dict[str, Any], data: int) -> TensorRange:
    begin, end = (int(offset) for offset in fields["data_offsets"])
    shape = tuple(int(size) for size in fields["shape"])
    found = TensorRange(path, str(fields["dtype"]), shape, data + begin, end - begin)
    if min(begin, found.length, *shape, 0) < 0:
        raise ValueError("negative")
    if found.dtype in DTYPES and found.length != math.prod(shape) * DTYPES[found.dtype].itemsize:
        raise ValueError("length")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: those that an index names, or every *.safetensors of the folder.

    Raises:
        ValueError: none, an index that is not one, or one that names a file that is not there.
    """
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder}: no *.safetensors; weights in other formats are not read")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, TypeError, AttributeError, LookupError):
        raise ValueError(f"{index}: not an index of shards; fetch it again") from None
    missing = [path.name for path in files if path.parent != folder or not path.is_file()]
    if missing or not files:
        raise ValueError(
            f"{folder}: {INDEX} names {', '.join(missing) or 'no shard'}, not in the folder; fetch it"
        )
    return files


def read_headers(files: Iterable[Path]) -> dict[str, TensorRange]:
    """All tensors of several files.

    Raises:
        ValueError: see `read_header`; or a tensor that stands in two files.
    """
    found: dict[str, TensorRange] = {}
    for path in files:
        for name, place in read_header(path).items():
            if name in found:
                raise ValueError(
                    f"{path}: holds {name}, which {found[name].path.name} holds too; keep one of them"
                )
            found[name] = place
    return found
