"""A worker of tiny stages with weights or rows shared out: `python sharded_fit.py FOLDER RANK COUNT`.

All workers together fit one case after the other, each in a folder of its own, from the checkpoint that lies there, if
one does; the first of them leaves what trained in <case>.safetensors. Then two of them make one NaN. First of all, two
workers share each row (`IN_PARTS`).
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny_teachers
from distilled_student import batch_of, build_student
from exact_norms import exact_norms
from tiny_gemma4 import build_teacher
from trihybrid.data import Batch
from trihybrid.distill.align import AlignTask
from trihybrid.distill.extend import ExtendTask, Extension
from trihybrid.distill.host_table import leave_tables
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.distill.task import LossTask
from trihybrid.ops.part import Part
from trihybrid.run import RunLog
from trihybrid.train import Checkpoints, FitSummary, TrainSection, Workers, fit, process_group

CASES = {
    "align": ("align", "adamw", torch.float64),
    "match": ("match", "adamw", torch.float64),
    "extend": ("extend", "muon", torch.float64),
    "untied": ("match", "adamw", torch.bfloat16),
}
IN_PARTS = {
    "align-parts": False,
    "match-parts": False,
    "extend-parts": False,
    "align-parts-shard": True,
    "match-parts-shard": True,
}
"""Case whose rows lie in two parts -> whether weights are shared out too, and tables left on the host."""
STEPS, HALF = 4, "step-000002"
RETAINED = "model.layers.3.self_attn.q_proj.weight"
"""Of a layer that both have: the teacher keeps a twin of it where it trains, and stage 1 does not run it."""
LAYERS = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}


def task_of(stage: str, dtype: torch.dtype, part: Part | None = None) -> LossTask:
    """A stage with a vocabulary and heads that two workers cannot halve; some layers are recomputed, some are not."""
    if dtype == torch.bfloat16:
        # A head of its own, and biases.
        teacher = tiny_teachers.build_teacher("llama-biased").to(dtype)
        student = build_student(teacher, pattern="FRFR")
        return MatchTask(Matching(Pair(student, teacher, NEW_MIXERS), chunk=16, checkpointing=True))
    # In stage 1, layers above the last converted one never run.
    whole = stage != "align"
    teacher = build_teacher(dtype, **LAYERS, num_kv_shared_layers=2 if whole else 0)
    student = build_student(teacher, pattern="SSRSSR" if whole else "SSRSSF")
    if stage == "extend":
        return ExtendTask(Extension(student, NEW_MIXERS, chunk=16, kept_layers=3, part=part))
    pair = Pair(student, teacher, [*NEW_MIXERS, RETAINED], part)
    if stage == "align":
        return AlignTask(pair, checkpointing=True)
    return MatchTask(Matching(pair, chunk=16, checkpointing=True, kept_layers=3))


def section_of(optimizer: str) -> TrainSection:
    """A short stage with clipping that bites, an average, and two parts a worker."""
    return TrainSection.model_validate(
        {
            "loop": {"steps": STEPS, "checkpoint_every": 2, "batch_size": 4, "accumulate": 2, "seed": 3},
            # AdamW divides by the size of a gradient, which at first may be noise alone; epsilon keeps that small.
            "optimizer": {
                "name": optimizer,
                "learning_rate": 0.01,
                "epsilon": 0.01,
                "gradient_clip": 0.05,
            },
            "schedule": {"kind": "constant"},
            "average": {"decay": 0.5},
        }
    )


def fit_case(
    case: str,
    folder: Path,
    workers: Workers,
    task: LossTask | None = None,
    shard: bool = True,
    host: bool = False,
) -> tuple[LossTask, FitSummary]:
    """Fit one case as one of the workers, on this worker's rows or parts of them; `host` leaves tables on the host."""
    stage, optimizer, dtype = CASES[case]
    if task is None:
        task = task_of(stage, dtype, workers.part())
        if host:
            leave_tables(task.module.student, workers.device)
        if workers.count > 1 and shard:
            task.shard(workers)
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(folder / "log.jsonl", stage, every=10**6) if workers.first else None

    def share(step: int) -> Batch:
        whole = batch_of(step, rows=4)
        rows = slice(workers.share, None, workers.shares)
        mine = Batch(whole.tokens_BT[rows], whole.positions_BT[rows])
        return task.complete(mine.part(workers.rank % workers.context, workers.context))

    checkpoints = Checkpoints(folder / "checkpoints", stage, "parent")
    with exact_norms():
        return task, fit(task, share, section_of(optimizer), checkpoints, log, True, workers)


def half_way(folder: Path, target: Path) -> None:
    """A run that was killed when half of its steps were done, between two checkpoints."""
    shutil.copytree(folder / "checkpoints" / HALF, target / "checkpoints" / HALF)
    (target / "checkpoints" / "temporary-step-000004").mkdir()


def overflow(module: nn.Module, arguments: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> tuple:
    """A mixer of which one number becomes infinite, on one worker alone."""
    return output[0] * torch.full((), float("inf")), output[1]


def main() -> None:
    folder, rank, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with process_group("cpu", f"file://{folder}/rendezvous", rank, count) as workers:
        together = replace(workers, context=2)
        for name, shard in IN_PARTS.items():
            task, _ = fit_case(name.partition("-")[0], folder / name, together, shard=shard, host=shard)
            whole = task.whole_parameters()
            if workers.first:
                save_file(whole, folder / f"{name}.safetensors")
        if count > 2:
            return
        for name in (*CASES, "untied-host", "match-again", "extend-from-one"):
            case = name.partition("-")[0]
            if name == "match-again" and workers.first:
                half_way(folder / "match", folder / name)
            workers.wait()
            task, _ = fit_case(case, folder / name, workers, host=name.endswith("-host"))
            whole = task.whole_parameters()
            assert bool(whole) == workers.first
            if workers.first:
                save_file(whole, folder / f"{name}.safetensors")
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(task))
        task = task_of("match", torch.float64)
        total = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(task))
        (folder / f"share-{rank}").write_text(str(held / total))
        task.shard(workers)
        if not workers.first:
            task.module.student.model.layers[2].self_attn.rwkv7.register_forward_hook(overflow)
        try:
            fit_case("match", folder / "broken", workers, task)
        except FloatingPointError as error:
            (folder / f"error-{rank}").write_text(str(error))


def tensors_of(task: LossTask) -> list[Tensor]:
    """What a task's weights hold, each storage once."""
    from torch.distributed.tensor import DTensor

    found = {}
    for parameter in task.module.parameters():
        tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        found[tensor.untyped_storage().data_ptr()] = tensor
    return list(found.values())


if __name__ == "__main__":
    main()
