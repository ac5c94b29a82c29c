"""Stage 3 against the stock model's loss.

Legend: B batch, T tokens.
"""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tiny_gemma4 import VOCABULARY
from trihybrid.data import Batch
from trihybrid.distill.extend import ExtendTask, Extension
from trihybrid.distill.section import NEW_MIXERS, ExtendSection
from trihybrid.testing import relative_error

SLIDING = "model.layers.3.self_attn.q_proj.weight"


def batch_of(*lengths: int) -> Batch:
    generator = torch.Generator().manual_seed(4)
    tokens_BT = torch.randint(3, VOCABULARY, (2, sum(lengths)), generator=generator)
    return Batch(tokens_BT, torch.cat([torch.arange(n) for n in lengths])[None].repeat(2, 1))


def dense(student: torch.nn.Module, batch: Batch) -> Tensor:
    logits = student(batch.inputs, position_ids=batch.positions, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


@pytest.mark.parametrize("options", [{"checkpointing": False}, {"kept_layers": 3, "chunk": 7, "block": 20}])
@pytest.mark.parametrize("lengths", [(97,), (30, 67)])
def test_loss_and_gradients_are_those_of_all_logits(make_teacher, make_student, lengths, options) -> None:
    """A sliding layer trains too: rows of two blocks, whose gradient goes through `sliding_attention`."""
    student = make_student(make_teacher(torch.float64), share_kv="teacher")
    naive, batch = copy.deepcopy(student), batch_of(*lengths)
    expected = dense(naive, batch)
    expected.backward()
    task = ExtendTask(Extension(student, [*NEW_MIXERS, SLIDING], **options))
    loss, metrics = task.loss(batch)
    loss.backward()
    assert relative_error(loss, expected) <= 1e-10 and metrics == {}
    gradients = dict(naive.named_parameters())
    assert SLIDING in task.parameters()
    for name, parameter in task.parameters().items():
        assert relative_error(parameter.grad, gradients[name].grad) <= 1e-8, name
    assert all(p.grad is None for n, p in student.named_parameters() if n not in task.parameters())
    assert task.roles().keys() == task.parameters().keys() and task.tokens(batch) == 2 * 96


def test_parts_weighted_by_their_targets_are_the_whole(make_teacher, make_student) -> None:
    """A row of two documents has one target fewer."""
    task = ExtendTask(Extension(make_student(make_teacher(torch.float64)), ["*.rwkv7.w0"]))
    whole = batch_of(97)
    whole.positions[1] = batch_of(30, 67).positions[1]
    parts = task.split(whole, 2)
    assert [task.weight(part) for part in parts] == [96, 95]
    total = sum(task.weight(part) * task.loss(part)[0] for part in parts) / task.weight(whole)
    assert relative_error(total, task.loss(whole)[0]) <= 1e-10


def test_section() -> None:
    section = ExtendSection.model_validate({"loop": {"steps": 1}})
    assert section.checkpointing and section.loss == "cross_entropy" and section.train == NEW_MIXERS
    with pytest.raises(ValueError, match="kept_layers: 2, but checkpointing is off"):
        ExtendSection.model_validate({"loop": {"steps": 1}, "checkpointing": False, "kept_layers": 2})
