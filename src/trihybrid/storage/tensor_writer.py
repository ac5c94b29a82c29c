"""Writing a safetensors file front to back, its header first, from ranges of other files and from tensors in memory.

A header needs names, dtypes and shapes alone, so the file never stands in memory: it passes through the buffers of a
`PieceWriter`.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from trihybrid.storage.piece_writer import PieceWriter
from trihybrid.storage.tensor_files import DTYPES, NAMES, StoredTensor, TensorRange, read_into


@dataclass(frozen=True)
class TensorShape:
    """What a header says of a tensor: safetensors' name of its dtype, its shape, its number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> "TensorShape":
        """That of a tensor that is going to be made."""
        return cls(NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)

    @classmethod
    def like(cls, source: StoredTensor) -> "TensorShape":
        """That of a tensor that is going to be copied."""
        return cls(source.dtype, source.shape, source.length)


def file_order(source: StoredTensor) -> tuple[int, Path, int]:
    """By this key tensors are best written: as they lie on the disk, but wide dtypes first, so that each begins at a
    multiple of its own width."""
    return -DTYPES.get(source.dtype, torch.uint8).itemsize, source.path, source.start


def header_bytes(tensors: Mapping[str, TensorShape]) -> bytes:
    """The beginning of a file with these tensors in this order, the length of the header included."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.length
        fields[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_bytes(tensors: Mapping[str, TensorShape]) -> int:
    """Size of the file with these tensors."""
    return len(header_bytes(tensors)) + sum(tensor.length for tensor in tensors.values())


class TensorWriter:
    """One safetensors file, a context. Its tensors are given in the order of `tensors`, each by `copy` or `put`.

    Args:
        path: a file that does not exist yet. Wider dtypes are best put first: a reader may want them aligned.
        tensors: name -> dtype and shape of all that the file will hold.

    Attributes:
        entry: the manifest's entry of the file; there after the context, when all of it is on the disk.

    Raises:
        OSError: the disk is full, or refuses in another way; from any of its methods.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorShape]) -> None:
        self.entry: dict[str, Any] = {}
        self._path = path
        self._tensors, self._names = dict(tensors), iter(tensors)
        self._pieces = PieceWriter(path)
        self._sources: dict[Path, int] = {}
        try:
            self._give(memoryview(header_bytes(tensors)))
        except BaseException:
            self._pieces.abandon()
            raise

    def copy(self, name: str, source: StoredTensor) -> None:
        """The bytes of a tensor as they lie in other files.

        Raises:
            ValueError: such a file has become shorter.
        """
        self._expect(name, TensorShape.like(source))
        for part in source.parts:
            self._copy(part)

    def _copy(self, source: TensorRange) -> None:
        if source.path not in self._sources:
            self._sources[source.path] = os.open(source.path, os.O_RDONLY)
        done = 0
        while done < source.length:
            space = self._pieces.space()[: source.length - done]
            read_into(self._sources[source.path], space, source.start + done, source.path)
            self._pieces.advance(len(space))
            done += len(space)

    def put(self, name: str, tensor: Tensor) -> None:
        """A tensor from memory."""
        self._expect(name, TensorShape.of(tensor.dtype, tuple(tensor.shape)))
        flat = tensor.detach().cpu().contiguous().flatten()
        self._give(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._sources.values():
            os.close(handle)
        if kind is not None:
            self._pieces.abandon()
            return
        assert next(self._names, None) is None, f"{self._path}: tensors are missing"
        self.entry = self._pieces.close()

    def _expect(self, name: str, tensor: TensorShape) -> None:
        expected = next(self._names)
        assert (name, tensor) == (expected, self._tensors[expected]), f"{name} in the place of {expected}"

    def _give(self, data: memoryview) -> None:
        while len(data):
            space = self._pieces.space()[: len(data)]
            space[:] = data[: len(space)]
            self._pieces.advance(len(space))
            data = data[len(space) :]
