"""Parts of rows on the ranks of a process group of torch.distributed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trihybrid.ops.part import Part


@dataclass(frozen=True)
class Ranks(Part):
    """Part p is that of rank p of a group: gloo for tensors on a CPU, NCCL for those on a GPU.

    Attributes:
        group: of torch.distributed; None for the default group.
    """

    group: dist.ProcessGroup | None = None

    def gather(self, own: Tensor) -> Tensor:
        every_P = own.new_empty(self.count, *own.shape)
        dist.all_gather(list(every_P.unbind()), own.contiguous(), group=self.group)
        return every_P

    def total(self, x: Tensor) -> Tensor:
        whole = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=self.group)
        return whole

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        found = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(found, rows.contiguous(), list(received), list(sent), group=self.group)
        return found
