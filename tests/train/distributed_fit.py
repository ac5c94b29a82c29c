"""A worker of a tiny data parallel run: `python distributed_fit.py FOLDER RANK COUNT [cuda]`, or under torchrun
`distributed_fit.py FOLDER torchrun`.

All workers together fit one case after the other, each in a folder of its own; rank 1 begins with other parameters.
"""

import sys
from pathlib import Path

import torch
from interrupted_fit import SplitTask, batch_of, section_of
from safetensors.torch import save_file

from trihybrid.run import RunLog
from trihybrid.train import AverageSection, Checkpoints, FitSummary, TrainSection, Workers, fit, process_group

CASES = {
    "adamw-float64": ("adamw", torch.float64, {}),
    "muon-float64": ("muon", torch.float64, {"accumulate": 2}),
    "muon-float32": ("muon", torch.float32, {}),
    "seconds": ("adamw", torch.float32, {"steps": 100_000, "seconds": 0.5, "checkpoint_every": 100_000}),
}


def section_for(case: str) -> TrainSection:
    optimizer, _, loop = CASES[case]
    section = section_of(optimizer, **{"steps": 6, "warmup_runs": 1, **loop})
    return section.model_copy(update={"average": AverageSection(decay=0.5)})


def fit_case(case: str, folder: Path, workers: Workers) -> tuple[SplitTask, FitSummary]:
    """Fit one case as one of the workers, on this worker's rows."""
    dtype = CASES[case][1]
    task = SplitTask(seed=workers.rank, dropout=0.0, dtype=dtype, device=str(workers.device))
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder / "checkpoints", "stage", "parent")
    log = RunLog(folder / "log.jsonl", "tiny", every=10**6) if workers.first else None

    def share(step: int) -> torch.Tensor:
        return batch_of(step).chunk(workers.count)[workers.rank]

    return task, fit(task, share, section_for(case), checkpoints, log, True, workers)


def main() -> None:
    folder = Path(sys.argv[1])
    if sys.argv[2] == "torchrun":
        group = process_group()
    else:
        rank, count = int(sys.argv[2]), int(sys.argv[3])
        group = process_group("cpu", f"file://{folder}/rendezvous", rank, count)
    with group as workers:
        for case in CASES:
            task, summary = fit_case(case, folder / case, workers)
            again, repeated = fit_case(case, folder / case, workers)
            assert summary == repeated
            tensors = {name: tensor.detach().cpu() for name, tensor in task.parameters().items()}
            assert all(torch.equal(tensor, again.tensors[name].cpu()) for name, tensor in tensors.items())
            tensors["steps"] = torch.tensor(summary.steps)
            save_file(tensors, folder / f"{case}-{workers.rank}.safetensors")


if __name__ == "__main__":
    main()
