"""The files of a checkpoint: tensors whole, or as the rows that each worker holds; any number of workers reads them.

Of `parameters`, say, one worker writes parameters.safetensors, and three write parameters-0-of-3.safetensors to
parameters-2-of-3.safetensors. What is not cut into rows stands in the first of them. For each tensor that is, the
manifest tells its shape and the first row in each file, so that a reader takes the rows that it wants from those files
that have some.

torch.distributed.checkpoint does the same, but its .metadata file is a pickle, and we load none.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trihybrid.run.lineage import hash_file
from trihybrid.storage.tensor_files import DTYPES, TensorRange, read_header
from trihybrid.train.rows import Rows

Places = dict[str, dict[str, list[int]]]
"""Name of a tensor in pieces -> its "shape", and its "borders": the first row in each file, and the number of rows."""


def piece_name(part: str, rank: int = 0, count: int = 1) -> str:
    """What the file of one of `count` workers is called."""
    return f"{part}.safetensors" if count == 1 else f"{part}-{rank}-of-{count}.safetensors"


def write_piece(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, and wait until the disk has them."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def described(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def place(rows: Rows) -> dict[str, list[int]]:
    """What a manifest says of a tensor in pieces."""
    return {"shape": list(rows.whole), "borders": rows.borders}


def read_pieces(
    folder: Path,
    part: str,
    files: Mapping[str, Mapping[str, Any]],
    count: int,
    places: Places,
    wanted: Callable[[str], Rows | None],
) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint, checked against the manifest.

    Args:
        folder, part: where, and of which part.
        files: name -> size and sha256.
        count: workers that wrote.
        places: of the tensors in pieces.
        wanted: name -> the rows to read, or None for the whole tensor; not asked of numbers.

    Raises:
        ValueError: a file is missing or damaged; a tensor has another shape than is wanted.
    """
    paths = [folder / piece_name(part, rank, count) for rank in range(count)]
    for path in paths:
        _check(path, files)
    headers = [read_header(path) for path in paths]
    tensors: dict[str, Tensor] = {}
    for name, first in headers[0].items():
        pieces, borders, shape = [first], [0, *first.shape[:1]], list(first.shape)
        if name in places:
            pieces = [header[name] for header in headers]
            borders, shape = places[name]["borders"], places[name]["shape"]
        rows = wanted(name) if shape else None
        if rows is None:
            tensors[name] = _rows(pieces, borders, 0, borders[-1]) if shape else first.read()
        elif list(rows.whole) == shape:
            tensors[name] = _rows(pieces, borders, rows.start, rows.end)
        else:
            raise ValueError(
                f"checkpoint {folder}: {name!r}: wanted {list(rows.whole)}, found {shape}; resume with the model that "
                "the checkpoint was made of, or start a new run directory"
            )
    return tensors


def _rows(pieces: Sequence[TensorRange], borders: Sequence[int], start: int, end: int) -> Tensor:
    """Rows `start` to `end` of a tensor of which piece k has those from `borders[k]` to `borders[k + 1]`."""
    found = []
    for piece, first, behind in zip(pieces, borders, borders[1:], strict=False):
        low, high = max(start, first), min(end, behind)
        if low < high:
            found.append(piece.block(low - first, high - first))
    if not found:
        return torch.empty(0, *pieces[0].shape[1:], dtype=DTYPES[pieces[0].dtype])
    return found[0] if len(found) == 1 else torch.cat(found)


def _check(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    cure = "delete this checkpoint's folder to go on from the one before it"
    if path.name not in files or not path.is_file():
        raise ValueError(f"{path}: missing; {cure}")
    wanted_size, size = files[path.name]["bytes"], path.stat().st_size
    if size != wanted_size:
        raise ValueError(f"{path}: truncated or changed: wanted {wanted_size} bytes, found {size}; {cure}")
    wanted_hash, found_hash = files[path.name]["sha256"], hash_file(path)
    if found_hash != wanted_hash:
        raise ValueError(f"{path}: damaged: wanted sha256 {wanted_hash}, found {found_hash}; {cure}")
