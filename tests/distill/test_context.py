"""Losses, metrics and gradients of rows in parts are those of whole rows.

The parts are threads here, each with models of its own; `test_shard.py` and `recipe/test_two_ranks.py` have processes.
"""

import pytest
import torch
from torch import Tensor

from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from distilled_student import build_student
from thread_workers import ThreadWorkers, by_threads
from tiny_gemma4 import VOCABULARY, build_teacher
from trihybrid.data import Batch
from trihybrid.distill.align import AlignTask
from trihybrid.distill.extend import ExtendTask, Extension
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.distill.task import LossTask
from trihybrid.models.gemma4.norm import FusedRMSNorm
from trihybrid.ops.part import Part
from trihybrid.testing import relative_error

LENGTH = 24
RETAINED = ["model.layers.1.self_attn.k_proj.weight", "model.layers.4.self_attn.v_proj.weight"]
"""Of sliding layers, the second of which lends its keys and values to two others."""
BORDERS = {
    "one document": [[], []],
    # Of two parts, at the border and inside both; of four, two in one part, and none in another.
    "packed": [[12], [9, 10, 19]],
    "of single tokens": [[], list(range(1, LENGTH + 1))],
}
"""Name -> for each row, the tokens that begin a document behind the first."""


def batch_of(kind: str, rows: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(11)
    tokens_BT = torch.randint(3, VOCABULARY, (rows, LENGTH + 1), generator=generator)
    positions_BT = torch.arange(LENGTH + 1).repeat(rows, 1)
    for row, begins in enumerate(BORDERS[kind]):
        for begin in begins:
            positions_BT[row, begin:] = torch.arange(LENGTH + 1 - begin)
    return Batch(tokens_BT, positions_BT)


def task_of(stage: str, part: Part | None) -> LossTask:
    """Full and sliding layers, some with the keys and values of others, rwkv7 + tica, some layers recomputed."""
    teacher = build_teacher(torch.float64)
    student = build_student(teacher, pattern="SSF SSR SSR", share_kv="teacher")
    train = [*NEW_MIXERS, *RETAINED]
    if stage == "extend":
        return ExtendTask(Extension(student, train, chunk=16, kept_layers=4, part=part))
    pair = Pair(student, teacher, NEW_MIXERS if stage == "align" else train, part)
    if stage == "align":
        return AlignTask(pair, checkpointing=True)
    return MatchTask(Matching(pair, chunk=16, checkpointing=True, kept_layers=4))


def differentiated(task: LossTask, batch: Batch, share: float) -> dict[str, Tensor]:
    """Loss, metrics and gradients."""
    loss, metrics = task.differentiate(batch, share)
    gradients = {name: parameter.grad for name, parameter in task.parameters().items()}
    return {"loss": share * loss, **metrics, **gradients}


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norms compute in float32 also of float64, whose noise would hide what is looked for."""

    def forward(norm: Gemma4RMSNorm, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        return normed * norm.weight if norm.with_scale else normed

    monkeypatch.setattr(FusedRMSNorm, "forward", forward)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("kind", ["one document", "packed"])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("stage", ["align", "match", "extend"])
def test_parts_are_the_whole(stage: str, parts: int, kind: str) -> None:
    """Four parts are shorter than the window of 8."""
    batch = batch_of(kind)
    expected = differentiated(task_of(stage, None), batch, 1.0)
    owns = [batch.part(index, parts) for index in range(parts)]
    weights = [float((own.targets != -100).sum()) if stage == "extend" else 1.0 for own in owns]
    shares = [weight / sum(weights) for weight in weights]
    # Models are made one after the other: torch's generator is everybody's.
    tasks = [task_of(stage, None) for _ in range(parts)]

    def work(workers: ThreadWorkers) -> dict[str, Tensor]:
        task = tasks[workers.rank]
        holder = task.module if stage == "extend" else task.module.pair
        holder.part = workers.part()
        return differentiated(task, owns[workers.rank], shares[workers.rank])

    found = by_threads(parts, work)
    assert all(one.keys() == expected.keys() for one in found)
    worst={}
    for name, wanted in expected.items():
        total = sum(one[name] for one in found)
        if name not in ("loss", *tasks[0].parameters()):
            total = total / parts
        worst[name]=relative_error(total, wanted)
    print(stage,parts,kind,max(worst.values()),worst['loss'], max(worst,key=worst.get))
