"""Where the tensors of a teacher come from: a model in memory, or ranges of its files. Surgery reads from either."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from trihybrid.storage.tensor_files import StoredTensor


class TensorSource(Protocol):
    """A teacher's tensors by the names that they have in its text model, read when they are asked for.

    `read` gives the whole tensor, which belongs to the source: do not write to it. `rows` gives rows N of it,
    [N, ...]. Both raise KeyError for a name that is not among `names`.
    """

    @property
    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor: ...

    def rows(self, name: str, rows_N: Tensor) -> Tensor: ...


class ModelSource:
    """Parameters and buffers of a model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def rows(self, name: str, rows_N: Tensor) -> Tensor:
        return self.read(name)[rows_N]


class FileSource:
    """Tensors in files."""

    def __init__(self, ranges: Mapping[str, StoredTensor]) -> None:
        self._ranges = dict(ranges)

    @property
    def names(self) -> list[str]:
        return list(self._ranges)

    def read(self, name: str) -> Tensor:
        return self._ranges[name].read()

    def rows(self, name: str, rows_N: Tensor) -> Tensor:
        return self._ranges[name].rows(rows_N)
