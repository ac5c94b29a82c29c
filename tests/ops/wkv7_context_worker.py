"""WKV-7 over several processes: `python wkv7_context_worker.py FOLDER COUNT`.

Importing torch takes longer than all cases, so one process imports it and then forks. Every case runs on the processes
of its parts; each writes what it holds afterwards to FOLDER/CASE-RANK.safetensors.
"""

import multiprocessing
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from trihybrid.ops.wkv7.context import wkv7_context
from wkv7_cases import NAMES, make, results, two_layers, weights


@dataclass(frozen=True)
class Case:
    """Parts of a sequence on processes 0, 1, ..

    lengths: tokens of each part.
    resets: tokens of the whole sequence where a document begins, in row 1 of 2; None for no resets at all.
    final_on: the ranks whose loss depends on the final state.
    layers: 1, or 2 that are recomputed in the backward.
    """

    lengths: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    state: bool = True
    resets: tuple[int, ...] | None = None
    backend: str | None = None
    final_on: tuple[int, ...] = (0, 1, 2)
    layers: int = 1

    def inputs(self) -> tuple[list[Tensor], Tensor | None, list[Tensor], Tensor]:
        """Of the whole sequence: tensors, resets, the gradient of the final state on each rank, that of the outputs."""
        total = sum(self.lengths)
        tensors = make(2, total, 3, 5, 4, self.dtype)
        reset = None
        if self.resets is not None:
            reset = torch.zeros(2, total, dtype=torch.bool)
            reset[1, list(self.resets)] = True
        dfinals = [
            weights(tensors[6].shape, self.dtype, 10 + rank) * (rank in self.final_on)
            for rank in range(len(self.lengths))
        ]
        return (
            tensors if self.state else tensors[:6],
            reset,
            dfinals,
            weights(tensors[3].shape, self.dtype, 9),
        )


CASES = {
    "two": Case((20, 13)),
    "two-float32": Case((40, 25), dtype=torch.float32),
    "two-reference": Case((3, 9), backend="reference"),
    "three": Case((17, 1, 30)),
    "three-float32": Case((40, 1, 70), dtype=torch.float32, resets=(55,)),
    "one-token-first": Case((1, 20, 2), final_on=(1,)),
    "without-state": Case((16, 19, 8), state=False, final_on=()),
    "reset-at-the-start": Case((18, 21, 7), resets=(0,)),
    "reset-in-the-first-part": Case((18, 21, 7), resets=(5,)),
    "reset-at-the-end-of-a-part": Case((18, 21, 7), resets=(17,)),
    "reset-at-a-joint": Case((18, 21, 7), resets=(18,)),
    "reset-in-the-last-part": Case((18, 21, 7), resets=(41,)),
    "reset-at-the-last-token": Case((18, 21, 7), resets=(45,), state=False),
    "resets-everywhere": Case((18, 1, 7), resets=(4, 17, 18, 19, 25)),
    "two-layers": Case((18, 21, 7), resets=(20,), layers=2),
    "alone": Case((12,)),
}


def run(case: Case, rank: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    tensors, reset, dfinals, do = case.inputs()
    start = sum(case.lengths[:rank])
    own = slice(start, start + case.lengths[rank])
    parts = [x[:, own] for x in tensors[:6]] + tensors[6:]
    dresults = (do[:, own], dfinals[rank] if rank in case.final_on else None)
    # A part without a border may do without resets.
    own_reset = reset[:, own] if reset is not None and (rank == 0 or bool(reset[:, own].any())) else None
    operator = wkv7_context if case.layers == 1 else two_layers(wkv7_context)
    found = results(operator, parts, dresults, reset_BT=own_reset, group=group, backend=case.backend)
    return {name: x.contiguous() for name, x in zip(NAMES, found, strict=False)}


def work(folder: Path, rank: int, count: int) -> None:
    # Fresh memory full of NaN, as in the tests themselves.
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    try:
        groups = {size: dist.new_group(list(range(size))) for size in range(1, count + 1)}
        for name, case in CASES.items():
            if rank < len(case.lengths):
                save_file(run(case, rank, groups[len(case.lengths)]), folder / f"{name}-{rank}.safetensors")
        if rank == count - 1:
            try:
                wkv7_context(*make(1, 2, 1, 2, 2, torch.float32), group=groups[1])
            except ValueError as error:
                (folder / "refusal.txt").write_text(str(error), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    processes = [
        multiprocessing.get_context("fork").Process(target=work, args=(folder, rank, count))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


if __name__ == "__main__":
    main()
