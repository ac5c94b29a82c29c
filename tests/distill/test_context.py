"""Losses, metrics and gradients of rows in parts are those of whole rows.

The parts are threads here, each with models of its own; `test_shard.py` and `recipe/test_two_ranks.py` have processes.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny_teachers
from distilled_student import build_student
from exact_norms import exact_norms
from thread_workers import ThreadWorkers, by_threads
from tiny_gemma4 import VOCABULARY, build_teacher
from trihybrid.data import Batch
from trihybrid.distill.align import AlignTask
from trihybrid.distill.extend import ExtendTask, Extension
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.distill.task import LossTask
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.ops.part import Part
from trihybrid.testing import relative_error

Models = tuple[PreTrainedModel, HybridForCausalLM]

LENGTH = 24
RETAINED = ["model.layers.[02].self_attn.k_proj.weight", "model.layers.4.self_attn.v_proj.weight"]
"""Of sliding and full layers; in Gemma, layer 4 lends its keys and values to two others."""
BORDERS = {
    "one document": [[], []],
    # Of two parts, at the border and inside both; of four, two in one part, and none in another.
    "packed": [[12], [9, 10, 19]],
    # The first of two parts has no target.
    "of single tokens": [list(range(1, 14)), list(range(1, 13))],
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


@pytest.fixture(scope="module")
def models() -> Models:
    """A teacher and its student: full and sliding layers, some with the keys and values of others, rwkv7 + tica."""
    teacher = build_teacher(torch.float64)
    return teacher, build_student(teacher, pattern="SSF SSR SSR", share_kv="teacher")


@pytest.fixture(scope="module")
def windowed() -> Models:
    """All layers of the teacher are full ones, two of the student's have a window."""
    teacher = tiny_teachers.build_teacher("llama", torch.float64)
    legend = {"W": {"mixer": "sliding", "window": 8}, "R": "rwkv7", "B": ["rwkv7", "tica"]}
    return teacher, build_student(teacher, pattern="WRWB", legend=legend)


@pytest.fixture
def one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_noise() -> Iterator[None]:
    with exact_norms():
        yield


def task_of(stage: str, models: Models, part: Part | None) -> LossTask:
    """Some layers are recomputed, some are not."""
    teacher, student = copy.deepcopy(models)
    kept = len(student.model.layers) // 2
    if stage == "extend":
        return ExtendTask(Extension(student, [*NEW_MIXERS, *RETAINED], chunk=16, kept_layers=kept, part=part))
    if stage == "align":
        return AlignTask(Pair(student, teacher, NEW_MIXERS, part), checkpointing=True)
    pair = Pair(student, teacher, [*NEW_MIXERS, *RETAINED], part)
    return MatchTask(Matching(pair, chunk=16, checkpointing=True, kept_layers=kept))


def differentiated(task: LossTask, batch: Batch, share: float) -> dict[str, Tensor]:
    """Share of the loss, gradients, and shares of the metrics."""
    loss, metrics = task.differentiate(batch, share)
    gradients = {name: parameter.grad for name, parameter in task.parameters().items()}
    return {"loss": share * loss, **gradients, **{name: share * value for name, value in metrics.items()}}


def compare(stage: str, models: Models, parts: int, kind: str) -> None:
    """Let threads have a part each: their numbers add up to those of one that has all."""
    batch = batch_of(kind)
    expected = differentiated(task_of(stage, models, None), batch, 1.0)
    owns = [batch.part(index, parts) for index in range(parts)]
    weights = [float((own.targets != -100).sum()) if stage == "extend" else 1.0 for own in owns]

    def work(workers: ThreadWorkers) -> dict[str, Tensor]:
        task = task_of(stage, models, workers.part())
        return differentiated(task, owns[workers.rank], weights[workers.rank] / sum(weights))

    found = by_threads(parts, work)
    assert all(one.keys() == expected.keys() for one in found)
    for name, wanted in expected.items():
        assert relative_error(sum(one[name] for one in found), wanted) <= 1e-10, name


@pytest.mark.usefixtures("without_noise", "one_thread_each")
@pytest.mark.parametrize(
    ("stage", "parts", "kind"),
    [
        ("align", 2, "one document"),
        ("align", 4, "packed"),
        ("match", 2, "one document"),
        ("match", 4, "packed"),
        ("extend", 2, "packed"),
        ("extend", 2, "of single tokens"),
    ],
)
def test_parts_are_the_whole(models: Models, stage: str, parts: int, kind: str) -> None:
    """Four parts are shorter than the window of 8."""
    compare(stage, models, parts, kind)


@pytest.mark.usefixtures("without_noise", "one_thread_each")
def test_windows_of_the_students_own(windowed: Models) -> None:
    """The teacher reads all earlier parts in a layer whose student reads a window."""
    compare("match", windowed, 2, "packed")


def test_what_parts_cannot_do_is_refused(models: Models, windowed: Models) -> None:
    part, batch = Part(0, 2), batch_of("packed").part(0, 2)
    pair = Pair(*reversed(copy.deepcopy(models)), NEW_MIXERS, part)
    with pytest.raises(ValueError, match="graph: true for rows in parts"):
        MatchTask(Matching(pair), graph=True)
    inputs = batch.inputs, batch.positions
    model = pair.student.model
    with pytest.raises(ValueError, match="part: rows in parts want position_ids"):
        model.prepare(inputs[0], part=part)
    pair.student.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match=r'attn_implementation is "eager"; rows in parts'):
        pair.prepare(*inputs)
    pair = Pair(*reversed(copy.deepcopy(windowed)), NEW_MIXERS, part)
    pair.student.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match='rope_type is "dynamic", whose frequencies depend on the length'):
        pair.prepare(*inputs)
