"""A worker of tiny stages with weights shared out: `python sharded_fit.py FOLDER RANK COUNT`.

All workers together fit one case after the other, each in a folder of its own, from the checkpoint that lies there, if
one does; the first of them leaves what trained in <case>.safetensors.
"""

import sys
from pathlib import Path

import torch
from distilled_student import batch_of, build_student
from safetensors.torch import save_file
from tiny_gemma4 import build_teacher

from trihybrid.data import Batch
from trihybrid.distill.align import AlignTask
from trihybrid.distill.extend import ExtendTask, Extension
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.distill.task import LossTask
from trihybrid.run import RunLog
from trihybrid.train import Checkpoints, FitSummary, TrainSection, Workers, fit, process_group

CASES = {"align": ("align", "adamw"), "match": ("match", "adamw"), "extend": ("extend", "muon")}
STEPS = 4
RETAINED = "model.layers.3.self_attn.q_proj.weight"
"""Of a layer that teacher and student have both: the teacher keeps a twin of what trains."""


def task_of(stage: str, dtype: torch.dtype = torch.float64) -> LossTask:
    """A stage on the tiny teacher, whose width the workers cannot divide everywhere; checkpointing in parts."""
    teacher = build_teacher(dtype)
    student = build_student(teacher)
    if stage == "extend":
        return ExtendTask(Extension(student, NEW_MIXERS, chunk=16, kept_layers=3))
    pair = Pair(student, teacher, NEW_MIXERS if stage == "align" else [*NEW_MIXERS, RETAINED])
    if stage == "align":
        return AlignTask(pair, checkpointing=True)
    return MatchTask(Matching(pair, chunk=16, checkpointing=True, kept_layers=4))


def section_of(optimizer: str) -> TrainSection:
    """A short stage with clipping that bites, an average, and two parts a worker."""
    return TrainSection.model_validate(
        {
            "loop": {"steps": STEPS, "checkpoint_every": 2, "batch_size": 4, "accumulate": 2, "seed": 3},
            "optimizer": {"name": optimizer, "learning_rate": 0.01, "gradient_clip": 0.05},
            "schedule": {"kind": "constant"},
            "average": {"decay": 0.5},
        }
    )


def fit_case(
    case: str, folder: Path, workers: Workers, task: LossTask | None = None
) -> tuple[LossTask, FitSummary]:
    """Fit one case as one of the workers, on this worker's rows."""
    stage, optimizer = CASES[case]
    if task is None:
        task = task_of(stage)
        if workers.count > 1:
            task.shard(workers)
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(folder / "log.jsonl", stage, every=10**6) if workers.first else None

    def share(step: int) -> Batch:
        whole = batch_of(step, rows=4)
        return Batch(
            *(tensor[workers.rank :: workers.count] for tensor in (whole.tokens_BT, whole.positions_BT))
        )

    checkpoints = Checkpoints(folder / "checkpoints", stage, "parent")
    return task, fit(task, share, section_of(optimizer), checkpoints, log, True, workers)


def main() -> None:
    folder, rank, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with process_group("cpu", f"file://{folder}/rendezvous", rank, count) as workers:
        for case in CASES:
            task, _ = fit_case(case, folder / case, workers)
            whole = task.whole_parameters()
            assert bool(whole) == workers.first
            if workers.first:
                save_file(whole, folder / f"{case}.safetensors")


if __name__ == "__main__":
    main()
