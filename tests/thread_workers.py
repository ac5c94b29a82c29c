"""Workers, and parts of rows, that are threads of one process, for what needs no process group to be right."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from trihybrid.ops.part import Part
from trihybrid.train import Workers


@dataclass(frozen=True)
class ThreadWorkers(Workers):
    """One of several threads.

    Attributes:
        barrier, board: the same for all; what each of them brings lies on the board.
    """

    barrier: Barrier = field(default_factory=lambda: Barrier(1))
    board: dict[int, Any] = field(default_factory=dict)

    def wait(self) -> None:
        self.barrier.wait(timeout=60)

    def gather(self, share_N: Tensor) -> Tensor:
        return torch.cat(self.swap(share_N))

    def average(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(torch.stack(self.swap(tensor)).mean(0))

    def part(self) -> "ThreadPart":
        """All workers share each row."""
        return ThreadPart(self.rank, self.count, self)

    def swap(self, tensor: Tensor) -> list[Tensor]:
        """What all workers bring."""
        self.board[self.rank] = tensor.clone()
        self.wait()
        found = [self.board[rank] for rank in range(self.count)]
        self.wait()
        return found


@dataclass(frozen=True)
class ThreadPart(Part):
    """The part of one of several threads."""

    workers: ThreadWorkers

    def gather(self, own: Tensor) -> Tensor:
        return torch.stack(self.workers.swap(own))

    def total(self, x: Tensor) -> Tensor:
        return torch.stack(self.workers.swap(x)).sum(0)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        assert sum(sent) == len(rows)
        plans = self.workers.swap(torch.tensor(sent))
        every = zip(self.workers.swap(rows), plans, strict=True)
        found = [other.split(plan.tolist())[self.index] for other, plan in every]
        assert [len(piece) for piece in found] == list(received)
        return torch.cat(found)


def by_threads(count: int, work: Callable[[ThreadWorkers], Any]) -> list[Any]:
    """What `work` returns on each of so many workers; an error of one ends the waiting of all, and is raised."""
    barrier, board = Barrier(count), {}

    def run(rank: int) -> Any:
        try:
            return work(ThreadWorkers(rank, count, barrier=barrier, board=board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(count)]]
