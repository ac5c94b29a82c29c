"""An artifact: a compact model in one file, with the account of its bytes. Torch outside, `container` inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trihybrid.compress.container import StoredTensor, encode_container, read_container
from trihybrid.compress.ledger import MOST_ELEMENTS, Ledger
from trihybrid.compress.tensors import PlainTensor, QuantisedTensor
from trihybrid.data.shards import write_atomically


@dataclass(frozen=True)
class Artifact:
    """What a file holds.

    Attributes:
        configuration: what builds the model, as it was written.
        tensors: parameter name -> float32 values on the CPU.
        ledger: the account of the file's bytes, checked.
    """

    configuration: dict[str, Any]
    tensors: dict[str, Tensor]
    ledger: Ledger


@dataclass(frozen=True)
class EncodedArtifact:
    """A file that is not written yet: the account of its bytes, and these in order."""

    ledger: Ledger
    pieces: list[bytes]

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all; its folder must exist, an old file is replaced."""
        write_atomically(Path(path), b"".join(self.pieces))


def encode_artifact(
    tensors: Sequence[QuantisedTensor | PlainTensor],
    configuration: dict[str, Any],
    code_bytes: int,
    codec: str = "smallest",
) -> EncodedArtifact:
    """What `write_artifact` writes, from the same arguments; raises what it raises."""
    return EncodedArtifact(
        *encode_container([_stored(tensor) for tensor in tensors], configuration, code_bytes, codec)
    )


def write_artifact(
    path: str | Path,
    tensors: Sequence[QuantisedTensor | PlainTensor],
    configuration: dict[str, Any],
    code_bytes: int,
    codec: str = "smallest",
) -> Ledger:
    """Write one file, whole or not at all; the same input gives the same bytes.

    Args:
        path: of the file; its folder must exist. An old file is replaced.
        tensors: what to store, in the order of the file.
        configuration: a JSON object, at most 15 levels deep.
        code_bytes: what the code beside the file takes, counted in the ledger's total, >= 0.
        codec: "smallest" (of those installed, tensor by tensor), or packed, rans, stored, zlib, lzma, zstd, brotli.

    Returns:
        The ledger.

    Raises:
        ValueError: an unknown or missing codec, a configuration that is not JSON, names that are doubled or not
            printable ASCII of at most 255 characters.
    """
    encoded = encode_artifact(tensors, configuration, code_bytes, codec)
    encoded.write(path)
    return encoded.ledger


def read_artifact(path: str | Path, limit_elements: int = MOST_ELEMENTS) -> Artifact:
    """A file's model, every byte of it checked.

    Args:
        path: of the file.
        limit_elements: most elements of all tensors together; bounds the memory, 4 bytes each and one part more.

    Raises:
        ValueError: naming the file and what is missing, damaged or hostile in it.
    """
    ledger, arrays = read_container(path, limit_elements)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Artifact(ledger.configuration, tensors, ledger)


def _stored(tensor: QuantisedTensor | PlainTensor) -> StoredTensor:
    if isinstance(tensor, PlainTensor):
        return StoredTensor(tensor.name, tensor.values.detach().cpu().numpy())
    return StoredTensor(
        tensor.name,
        tensor.integers_RC.detach().cpu().contiguous().numpy(),
        tensor.scales_R.detach().cpu().numpy(),
        tensor.bits,
    )
