"""Tensors of which each worker holds some rows.

The first axis of R rows is cut into n parts of ceil(R / n) rows, of which the last ones may be shorter or empty: worker
k of n holds the rows from min(k ceil(R / n), R) up to the next one's. FSDP2 cuts the same way (`torch.chunk`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from trihybrid.train.distributed import Workers


@dataclass(frozen=True)
class Rows:
    """The part of one tensor that one worker holds.

    Attributes:
        whole: shape of the tensor, one axis at least.
        rank, count: this worker's number, and how many share the tensor.
    """

    whole: tuple[int, ...]
    rank: int
    count: int

    @property
    def share(self) -> int:
        """Rows of a full part."""
        return -(-self.whole[0] // self.count)

    @property
    def borders(self) -> list[int]:
        """The first row of each worker, and R."""
        return [min(rank * self.share, self.whole[0]) for rank in range(self.count + 1)]

    @property
    def start(self) -> int:
        """This worker's first row."""
        return self.borders[self.rank]

    @property
    def end(self) -> int:
        """The row behind its last one."""
        return self.borders[self.rank + 1]

    def cut(self, whole: Tensor) -> Tensor:
        """This worker's rows of a whole tensor, a view."""
        return whole[self.start : self.end]

    def join(self, parts: Sequence[Tensor], workers: Workers) -> list[Tensor]:
        """Whole tensors of this shape, of which all workers bring their parts at the same time."""
        full = parts[0].new_zeros(self.share, len(parts), *self.whole[1:])
        for place, part in enumerate(parts):
            full[: part.shape[0], place] = part
        # Only the last parts are filled up, so what is too much lies at the end.
        return list(workers.gather(full)[: self.whole[0]].unbind(1))


NO_ROWS: Mapping[str, Rows] = MappingProxyType({})
"""Parameter name -> rows, where every worker holds whole tensors."""


def padded(rows: Rows, whole: Tensor, device: torch.device) -> Tensor:
    """This worker's rows of a whole tensor on its device, with rows of zeros up to a full part."""
    full = torch.zeros(rows.share, *rows.whole[1:], dtype=whole.dtype, device=device)
    full[: rows.end - rows.start] = rows.cut(whole)
    return full
