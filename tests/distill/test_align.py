"""Legend: B batch, T tokens, D model width."""

import copy

import pytest
import torch
from torch import Tensor, nn

from distances import distance
from trihybrid.distill.align import Alignment, AlignTask, relative_distance
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.distill.trained import roles_of
from trihybrid.surgery.calibrate import record_layers
from trihybrid.testing import relative_error

CONVERTED = (2, 5, 8)
KINDS = [{}, {"share_kv": "teacher"}, {"donor_keys_values": "share"}, {"pattern": "SSR SSF SSF"}]


def pair_of(teacher, student) -> Pair:
    return Pair(student, copy.deepcopy(teacher), NEW_MIXERS)


def dense_losses(teacher, student, tokens_BT: Tensor, positions_BT: Tensor) -> list[Tensor]:
    """Two whole models: the stock teacher with hooks, and the student's slots on what the hooks saw."""
    slots = {i: s for i, s in enumerate(student.config.slot_list()) if s.converted}
    records = record_layers(teacher.model, [(tokens_BT, positions_BT)], slots)
    _, stream = student.model.prepare(tokens_BT, position_ids=positions_BT)
    losses = []
    for index in slots:
        layer = student.model.layers[index]
        y_BTD = layer.self_attn.mix(records[index].inputs[0], stream.span, stream.shared, None)
        ours = layer.post_attention_layernorm(y_BTD)
        theirs = layer.post_attention_layernorm(records[index].outputs[0]).detach()
        losses.append(distance(ours, theirs))
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fields", KINDS)
def test_losses_and_gradients_are_those_of_two_whole_models(
    make_teacher, make_student, block, fields, checkpointing
) -> None:
    teacher = make_teacher(torch.float64)
    student = make_student(teacher, **fields)
    naive = copy.deepcopy(student)
    expected = dense_losses(teacher, naive, *block)
    torch.stack(expected).mean().backward()
    pair = pair_of(teacher, student)
    loss, losses = Alignment(pair, checkpointing)(*block)
    loss.backward()
    assert list(losses) == [f"alignment/{index}" for index in pair.converted]
    torch.testing.assert_close(list(losses.values()), expected, rtol=1e-10, atol=0)
    gradients = dict(naive.named_parameters())
    for name, parameter in pair.trained.items():
        assert relative_error(parameter.grad, gradients[name].grad) <= 1e-8, name
    assert all(p.grad is None for n, p in student.named_parameters() if n not in pair.trained)


def test_the_scale_of_a_slots_output_does_not_matter(make_teacher, make_student, block) -> None:
    """n(y) = n(100 y) for a scale-free norm, up to its epsilon."""
    teacher = make_teacher(torch.float64)
    student = make_student(teacher, noise=0.0)
    alignment = Alignment(pair_of(teacher, student))
    with torch.no_grad():
        before = alignment(*block)[1]
        for index in CONVERTED:
            student.model.layers[index].self_attn.rwkv7.output.weight.mul_(100)
        after = alignment(*block)[1]
    for name in before:
        assert before[name] > 0.1 and after[name].item() == pytest.approx(before[name].item(), rel=1e-4)


class Repeats(nn.Module):
    """A slot that says what the teacher said there, times a factor."""

    def __init__(self, outputs: list[Tensor], factor: float) -> None:
        super().__init__()
        self.outputs, self.factor = outputs, factor

    def mix(self, x_BTD: Tensor, *_: object) -> Tensor:
        return self.factor * self.outputs[0]


@pytest.mark.parametrize(("factor", "bound"), [(1.0, 0.0), (100.0, 1e-9), (-1.0, None)])
def test_a_slot_that_says_what_the_teacher_says_has_no_loss(
    make_teacher, make_student, block, factor, bound
) -> None:
    teacher = make_teacher(torch.float64)
    pair = pair_of(teacher, make_student(teacher))
    records = record_layers(teacher.model, [block], CONVERTED)
    for index in CONVERTED:
        pair.student.model.layers[index].self_attn = Repeats(records[index].outputs, factor)
    losses = Alignment(pair)(*block)[1].values()
    if bound is None:
        assert all(loss.item() == pytest.approx(4.0, rel=1e-12) for loss in losses)
    else:
        assert all(loss.item() <= bound for loss in losses)


@pytest.mark.parametrize("fields", KINDS[:3])
def test_packed_documents_are_separate_documents(make_teacher, make_student, block, fields) -> None:
    """Sums above and below the line add up over the documents of a row."""
    teacher = make_teacher(torch.float64)
    student = make_student(teacher, **fields)
    alignment = Alignment(pair_of(teacher, student))
    row = tokens_BT, positions_BT = block[0][:1], block[1][:1]
    parts = [(t, p) for t, p in zip(tokens_BT.split([9, 15], 1), positions_BT.split([9, 15], 1), strict=True)]
    with torch.no_grad():
        whole = alignment(*row)[1]
        separate = [alignment(*part)[1] for part in parts]
        records = [record_layers(teacher.model, [part], CONVERTED) for part in parts]
    for index in CONVERTED:
        norm = student.model.layers[index].post_attention_layernorm
        weights = [norm(record[index].outputs[0]).pow(2).sum() for record in records]
        name = f"alignment/{index}"
        mean = sum(w * s[name] for w, s in zip(weights, separate, strict=True)) / sum(weights)
        assert relative_error(whole[name], mean) <= 1e-10


def test_layers_above_the_last_conversion_are_not_run(make_teacher, make_student, block) -> None:
    teacher = make_teacher()
    pair = pair_of(teacher, make_student(teacher, pattern="SSR SSF SSF"))
    calls = []
    for index, layer in enumerate(pair.student.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    Alignment(pair)(*block)
    assert calls == [0, 1, 2]


def test_relative_distance() -> None:
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    target = torch.tensor([[0.0, 4.0], [1.0, 2.0]], requires_grad=True)
    assert relative_distance(x, target).item() == pytest.approx((25 / 16 + 1 / 5) / 2)
    assert relative_distance(target, target).item() == 0
    assert not relative_distance(x, target).requires_grad
    assert relative_distance(x.bfloat16(), target.bfloat16()).dtype == torch.float32
    assert relative_distance(x.double(), target.double()).dtype == torch.float64
    assert relative_distance(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0


def test_relative_distance_by_autograd() -> None:
    """The backward by hand against the formula, and what waits for it: no tensor of its own."""
    generator = torch.Generator().manual_seed(0)
    x, target = (
        torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    found = torch.autograd.grad(3 * relative_distance(x, target), x)[0]
    aim = target.detach()
    expected = torch.autograd.grad(3 * distance(x, aim), x)[0]
    assert relative_error(found, expected) <= 1e-12
    half = x.detach().bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = relative_distance(half, aim.bfloat16())
    assert {t.dtype for t in saved if t.dim() > 1} == {torch.bfloat16}
    assert torch.autograd.grad(loss, half)[0].dtype == torch.bfloat16


def test_task(make_teacher, make_student, make_batch) -> None:
    teacher = make_teacher()
    pair = pair_of(teacher, make_student(teacher))
    task = AlignTask(pair)
    loss, metrics = task.loss(make_batch(1))
    assert task.parameters() is pair.trained and task.roles() == roles_of(pair.student, pair.trained)
    assert task.tokens(make_batch(1)) == 48
    assert not any(value.requires_grad for value in metrics.values())
    assert torch.stack(list(metrics.values())).mean().item() == pytest.approx(loss.item())
