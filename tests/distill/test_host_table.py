"""Tables on the host: a step is that of tables on the device, to the bit.

Legend: B batch, T tokens.
"""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny_teachers
from trihybrid.data import Prefetch
from trihybrid.distill.align import AlignTask
from trihybrid.distill.extend import ExtendTask, Extension
from trihybrid.distill.graph import Graphed
from trihybrid.distill.host_table import HostTable, LookedUpBatch, check_apart, host_tables, leave_tables
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.distill.task import LossTask
from trihybrid.models.checkpoint import load_student, load_teacher
from trihybrid.train import Checkpoints, TrainSection, fit

CPU = torch.device("cpu")
SMALL = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
}
STAGES = ["align", "match", "extend"]


@pytest.fixture
def make_task(make_teacher, make_student):
    """A stage of a Gemma-4-shaped student of three layers in bfloat16, its tables on the host or not."""

    def make(stage: str, host: bool) -> LossTask:
        teacher = make_teacher(torch.bfloat16, **SMALL)
        student = make_student(teacher, pattern="SSR")
        if stage == "extend":
            task: LossTask = ExtendTask(Extension(student, NEW_MIXERS, chunk=16))
        else:
            pair = Pair(student, teacher, NEW_MIXERS)
            task = AlignTask(pair) if stage == "align" else MatchTask(Matching(pair, chunk=16))
        if host:
            leave_tables(student, CPU)
        return task

    return make


def train(task: LossTask, make_batch, folder: Path) -> tuple[float, dict[str, Tensor]]:
    """The last of two steps' losses, and what trained."""
    section = TrainSection.model_validate(
        {
            "loop": {"steps": 2, "checkpoint_every": 2, "batch_size": 2, "accumulate": 2, "seed": 3},
            "optimizer": {"learning_rate": 0.01},
            "schedule": {"kind": "constant"},
        }
    )
    with Prefetch(lambda step: task.complete(make_batch(step)), device=CPU) as batches:
        summary = fit(task, batches, section, Checkpoints(folder, "stage", "parent"), None, True)
    return summary.loss, task.whole_parameters()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_the_same_to_the_bit(make_task, make_batch, tmp_path, stage, caplog) -> None:
    caplog.set_level(logging.INFO, "trihybrid.distill.host_table")
    task = make_task(stage, host=True)
    assert (
        "tables: 4656 bytes stay in host memory" in caplog.text
    )  # 97 words of 3 layers of 8 numbers of 2 bytes
    loss, trained = train(task, make_batch, tmp_path / "host")
    plain = make_task(stage, host=False)
    expected, wanted = train(plain, make_batch, tmp_path / "device")
    assert plain.whole and not task.whole
    assert loss == expected and trained.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in trained.items())


def test_an_embedding_that_is_not_the_head_stays_too(make_batch) -> None:
    from distilled_student import build_student

    losses = []
    for host in (False, True):
        teacher = tiny_teachers.build_teacher("llama-biased", torch.bfloat16, pad_token_id=96)
        student = build_student(teacher, pattern="FRFR")
        task = MatchTask(Matching(Pair(student, teacher, NEW_MIXERS), chunk=16))
        if host:
            leave_tables(student, CPU)
            assert list(host_tables(student.model)) == ["embed_tokens"]
        loss, _ = task.differentiate(task.complete(make_batch(0)), 1.0)
        losses.append(loss)
    assert torch.equal(*losses)


def test_tables_move_with_nothing(make_task) -> None:
    """Not to a device, to no other dtype, into no state; the scale of the embedding does."""
    task = make_task("match", host=True)
    (table,) = host_tables(task.module.student.model).values()
    address, before = table.weight.data_ptr(), table.weight.clone()
    task.module.to("meta")
    assert table.weight.device.type == "cpu" and table.weight.data_ptr() == address
    assert torch.equal(table.weight, before) and table.table.embed_scale.is_meta
    held = sum(tensor.numel() for name, tensor in task.module.state_dict().items() if "per_layer.t" in name)
    assert held == 0
    assert task.module.student.model.embed_tokens.weight.is_meta


def test_the_recording_gets_the_same_tensors(make_task, make_batch) -> None:
    """What a CUDA graph is given is made before, with rows or without."""
    found = []
    for host in (False, True):
        task = make_task("match", host)
        batch = task.complete(make_batch(1))
        prepared = task.module.prepare(*task.inputs(batch))
        found.append(Graphed(task.module, []).take_apart(*prepared)[0])
    assert "per layer" in found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_rows_follow_their_tokens(make_task, make_batch) -> None:
    task = make_task("match", host=True)
    whole = task.complete(make_batch(0, rows=4))
    assert isinstance(whole, LookedUpBatch)
    parts = task.split(whole.to("meta"), 2)
    for index, part in enumerate(parts):
        (rows_BTD,) = task.inputs(part)[2].values()
        ids_BT = whole.inputs[2 * index : 2 * index + 2]
        (table,) = host_tables(task.module.student.model).values()
        assert part.inputs.is_meta and torch.equal(rows_BTD, table.weight[ids_BT])
    for index in range(3):
        part = whole.part(index, 3)
        (rows_BTD,) = task.inputs(part)[2].values()
        assert torch.equal(part.inputs, whole.inputs[:, 8 * index : 8 * index + 8])
        assert torch.equal(rows_BTD, table.weight[part.inputs])


def test_refusals(make_task, make_batch) -> None:
    task = make_task("match", host=True)
    with pytest.raises(ValueError, match=r"no rows came with these ids; make the batch with .*`complete`"):
        task.loss(make_batch(0))
    with pytest.raises(
        ValueError, match="tables: host for a table that trains; freeze it, or give tables: device"
    ):
        HostTable(nn.Embedding(3, 2), CPU)
    with pytest.raises(ValueError, match=r"only table is its head too, .* give tables: device"):
        check_apart(tiny_teachers.teacher_config("llama"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_a_table_is_the_pages_of_its_file(make_teacher, make_student, tmp_path) -> None:
    """Of a folder's models nothing is copied: all processes of a machine share one table."""
    teacher = make_teacher(torch.bfloat16, **SMALL)
    make_student(teacher, pattern="SSR").save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    student = load_student(tmp_path / "student")
    Pair(student, load_teacher(tmp_path / "teacher"), NEW_MIXERS)
    leave_tables(student, CPU)
    (table,) = host_tables(student.model).values()
    assert mapped_file(table.weight) == str(tmp_path / "student" / "model.safetensors")


def mapped_file(tensor: Tensor) -> str:
    """The file whose pages a tensor is, "" for memory of its own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, *_, name = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in area.split("-"))
        if first <= tensor.data_ptr() < last:
            return name if name.startswith("/") else ""
    return ""


@pytest.mark.gpu
def test_page_locked_rows_outlive_their_copies() -> None:
    """Many steps back to back, made while the device is still at the first one: whose memory is used again too early
    arrives with the rows of a later step."""
    generator = torch.Generator().manual_seed(1)
    embedding = nn.Embedding(5000, 4096, dtype=torch.bfloat16).requires_grad_(False)
    whole = embedding.weight.cuda()
    table = HostTable(embedding, torch.device("cuda"))
    batches = [torch.randint(5000, (1, 1024), generator=generator) for _ in range(40)]
    torch.cuda._sleep(2_000_000_000)
    sent = []
    for ids_BT in batches:
        rows_BTD = table.look_up(ids_BT)
        assert rows_BTD.is_pinned()
        sent.append(table.finish(rows_BTD.to("cuda", non_blocking=True)))
        del rows_BTD
    for ids_BT, found_BTD in zip(batches, sent, strict=True):
        assert torch.equal(found_BTD, whole[ids_BT.cuda()])


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_a_stage_on_a_gpu_is_the_same_to_the_bit(make_teacher, make_student, make_batch, graph) -> None:
    """Losses of several steps, with the rows made ahead by another thread; the table itself is not on the GPU."""
    found: list[list[Tensor]] = []
    for host in (False, True):
        teacher = make_teacher(torch.bfloat16)
        student = make_student(teacher)
        pair = Pair(student, teacher, NEW_MIXERS)
        if host:
            leave_tables(student, torch.device("cuda"))
        task = MatchTask(Matching(pair.cuda(), chunk=16), graph)
        assert student.model.embed_tokens_per_layer.weight.is_cuda is not host
        with Prefetch(
            lambda step, task=task: task.complete(make_batch(step, length=80)), device="cuda"
        ) as batches:
            found.append([task.differentiate(batches(step), 1.0)[0] for step in range(6)])
        found[-1] += [parameter.grad for parameter in task.parameters().values()]
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)
