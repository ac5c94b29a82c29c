"""Data parallel training: every worker holds the whole model and takes an equal share of each batch: some of its rows,
or, where `context` workers share rows, a part of the tokens of some rows.

What has to be the same everywhere is made so: parameters and torch's generators come from the first worker at the
start, gradients are averaged before they are clipped, and where the clock decides, the first worker's clock does.
The first worker alone writes. Numbers on a CPU travel by gloo, tensors on a GPU by NCCL.

A checkpoint is read by all, so workers on several machines need a folder that all of them see. All workers draw the
same random numbers (dropout masks repeat from share to share). Which parameters get a gradient must not depend on
the data.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from trihybrid.ops.ranks import Ranks

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workers:
    """The processes that train together, seen from one of them. A single process is `ALONE`, for which all methods
    return at once.

    Attributes:
        rank: this one's number, from 0.
        count: how many there are.
        device: where this one keeps its model.
        context: how many workers, one after the other, share each row; it divides `count`.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    context: int = 1

    @property
    def first(self) -> bool:
        """Whether this worker is the one that writes and decides."""
        return self.rank == 0

    @property
    def shares(self) -> int:
        """Into how many equal shares the rows of a batch are cut."""
        return self.count // self.context

    @property
    def share(self) -> int:
        """The number of this worker's share, from 0."""
        return self.rank // self.context

    def part(self) -> Ranks | None:
        """Which part of its rows is this worker's; None where it has whole rows. All workers ask at once."""
        if self.context == 1:
            return None
        group, _ = dist.new_subgroups(self.context)
        return Ranks(self.rank % self.context, self.context, group)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite these tensors by those of the first worker; shapes, dtypes and order are the same everywhere."""
        if self.count > 1:
            with torch.no_grad():
                for tensor in tensors:
                    whole = tensor.contiguous()
                    dist.broadcast(whole, src=0)
                    tensor.copy_(whole)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the workers: one reduction of a flat buffer, float64 if one of them is,
        else float32.
        """
        if self.count == 1 or not tensors:
            return
        wide = any(tensor.dtype == torch.float64 for tensor in tensors)
        dtype = torch.float64 if wide else torch.float32
        with torch.no_grad():
            flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.count
            pieces = flat.split([tensor.numel() for tensor in tensors])
            views = [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
            torch._foreach_copy_(list(tensors), views)

    def gather(self, share_N: Tensor) -> Tensor:
        """The shares of all workers, one after the other along the first axis; all have the same shape."""
        if self.count == 1:
            return share_N
        whole = share_N.new_empty(self.count * share_N.shape[0], *share_N.shape[1:])
        # Its name since torch 2.13, and the one before.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, share_N.contiguous())
        return whole

    def exchange(self, parts: Tensor) -> Tensor:
        """[count, ...], a part for each worker, in their order: what each of them has for this one."""
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts.contiguous())
        return received

    def total(self, value: float) -> float:
        """The sum over the workers of a number on the CPU; the GPU is not waited for."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared)
        return shared.item()

    def first_value(self, value: float) -> float:
        """The first worker's value of a number on the CPU; the GPU is not waited for."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return shared.item()

    def differ(self, numbers: Sequence[float]) -> bool:
        """Whether any worker's numbers (equally many everywhere, on the CPU) are not those of the first; also a point
        that none passes before all are there.
        """
        if self.count == 1:
            return False
        own = torch.tensor(list(numbers), dtype=torch.float64)
        first = own.clone()
        dist.broadcast(first, src=0)
        different = (own != first).any().double().reshape(1)
        dist.all_reduce(different)
        return different.item() > 0.0

    def wait(self) -> None:
        """Return once all workers are here; the GPUs are not waited for."""
        if self.count > 1:
            work = dist.all_reduce(torch.zeros(1), async_op=True)
            work.wait()
            _held[:] = [work]

    def share_generators(self) -> None:
        """Set torch's generators, the CPU's and that of this worker's own GPU, to the state of the first worker's."""
        if self.count == 1:
            return
        state = torch.get_rng_state()
        dist.broadcast(state, src=0)
        torch.set_rng_state(state)
        if self.device.type == "cuda":
            state = torch.cuda.get_rng_state(self.device)
            dist.broadcast(state, src=0)
            torch.cuda.set_rng_state(state, self.device)


_held: list[dist.Work] = []
"""The last meeting. Whoever lets go of it last frees its tensor, and needs Python for that. A process that ends behind
the meeting must not leave this to a thread of gloo's, which lives on where meshes of torch hold its group: a thread
that asks for an interpreter that is ending is ended itself, and the process with it (SIGABRT)."""

ALONE = Workers()
"""The only worker of a run in a single process."""


@contextmanager
def process_group(
    device: str = "cuda", rendezvous: str | None = None, rank: int | None = None, count: int | None = None
) -> Iterator[Workers]:
    """Join the other workers, and leave them at the end.

        with process_group() as workers:
            fit(..., workers=workers)

    Args:
        device: "cuda" (this worker takes the GPU of its number on its machine) or "cpu".
        rendezvous: address in torch's form ("file:///...", "tcp://host:port"); None means the one that torchrun
            agreed on, together with rank and count.
        rank, count: this worker's number and how many there are, where `rendezvous` is given.

    Raises:
        ValueError: the device is neither, or cuda is not there; rendezvous, rank and count are given in part; without
            a rendezvous, the process was not started by torchrun.
    """
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device: {device!r} is neither 'cuda' nor 'cpu'; choose one of them")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' asked for, but torch sees no CUDA device; choose 'cpu'")
    given = [value is not None for value in (rendezvous, rank, count)]
    if any(given) and not all(given):
        raise ValueError(
            f"rendezvous: {rendezvous!r} with rank {rank} and count {count}; give all three, or none under torchrun"
        )
    if not any(given) and not dist.is_torchelastic_launched():
        raise ValueError(
            "rendezvous: none given, and torchrun did not start this process; start it with torchrun"
        )
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", dist.get_node_local_rank(fallback_rank=rank or 0))
        torch.cuda.set_device(place)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=rendezvous,
        rank=-1 if rank is None else rank,
        world_size=-1 if count is None else count,
        device_id=place if device == "cuda" else None,
    )
    try:
        workers = Workers(dist.get_rank(), dist.get_world_size(), place)
        _logger.info("worker %d of %d on %s", workers.rank, workers.count, place)
        yield workers
    finally:
        dist.destroy_process_group()
