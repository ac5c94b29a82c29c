"""Legend: B batch, T tokens, D model width, V vocabulary, A allowed vocabulary."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distances import distance
from trihybrid.distill.align import AlignTask
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.distill.trained import roles_of
from trihybrid.models.decoder.sliding import Window
from trihybrid.testing import relative_error

SLIDING = "model.layers.3.self_attn.k_proj.weight"
LENT = "model.layers.4.self_attn.v_proj.weight"
KINDS = [
    ({}, ()),
    ({"share_kv": "teacher"}, ()),
    ({"share_kv": "teacher", "donor_keys_values": "share"}, ()),
    ({"pattern": "SSR SSF SSF"}, ()),
    # Layer 4 lends its keys and values to layers 6 and 7.
    ({}, (SLIDING, LENT, "model.layers.1.mlp.down_proj.weight")),
    # Both streams part at layer 6, which reads what layer 4 has shared below.
    ({"pattern": "SSF SSF SSR"}, ("model.layers.6.mlp.down_proj.weight",)),
]


def dense(
    teacher, student, tokens_BT: Tensor, positions_BT: Tensor, first: int, **options: Any
) -> dict[str, Tensor]:
    """The formula with two whole models and all logits at once."""

    def run(model) -> tuple[list[Tensor], Tensor]:
        states: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, arguments, output: states.append(output.clone()))
            for layer in model.model.layers
        ]
        logits = model(tokens_BT, position_ids=positions_BT, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return states, logits

    with torch.no_grad():
        teacher_states, teacher_BTV = run(teacher)
    student_states, student_BTV = run(student)
    allowed = options.get("allowed_V", torch.arange(teacher_BTV.shape[-1]))
    temperature = options.get("temperature", 1.0)
    p, q = ((x[..., allowed] / temperature).log_softmax(-1) for x in (teacher_BTV, student_BTV))
    distances = [distance(s, t) for s, t in list(zip(student_states, teacher_states, strict=True))[first:]]
    kl, hidden = (p.exp() * (p - q)).sum(-1).mean(), torch.stack(distances).mean()
    same = (teacher_BTV[..., allowed].argmax(-1) == student_BTV[..., allowed].argmax(-1)).double().mean()
    return {
        "loss": kl + options.get("alignment_weight", 0.1) * hidden,
        "kl": kl,
        "hidden": hidden,
        "agreement": same,
        **{f"hidden/{index}": distance for index, distance in enumerate(distances, first)},
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("fields", "train"), KINDS)
def test_loss_and_gradients_are_the_dense_formula(
    make_teacher, make_student, block, fields, train, checkpointing
) -> None:
    teacher = make_teacher(torch.float64)
    student = make_student(teacher, **fields)
    naive = copy.deepcopy(student)
    pair = Pair(student, copy.deepcopy(teacher), [*NEW_MIXERS, *train])
    expected = dense(teacher, naive, *block, pair.first_difference)
    expected["loss"].backward()
    loss, parts = Matching(pair, checkpointing=checkpointing, chunk=7)(*block)
    loss.backward()
    torch.testing.assert_close(parts | {"loss": loss}, expected, rtol=1e-9, atol=1e-12)
    gradients = dict(naive.named_parameters())
    for name, parameter in pair.trained.items():
        assert relative_error(parameter.grad, gradients[name].grad) <= 1e-8, name
    assert all(p.grad is None for n, p in student.named_parameters() if n not in pair.trained)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.0},
        {"alignment_weight": 0.0},
        {"alignment_weight": 3.0},
        {"allowed_V": torch.arange(5, 60, 3)},
    ],
)
def test_options_do_what_the_formula_says(make_teacher, make_student, block, options) -> None:
    teacher = make_teacher(torch.float64)
    student = make_student(teacher)
    pair = Pair(student, copy.deepcopy(teacher), NEW_MIXERS)
    expected = dense(teacher, student, *block, 2, **options)
    loss, parts = Matching(pair, **options)(*block)
    torch.testing.assert_close(parts | {"loss": loss}, expected, rtol=1e-9, atol=1e-12)


class Inherited(nn.Module):
    """The teacher's attention in the place of a converted slot."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, hidden_states: Tensor, span: object, shared: object, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        return self.attention(hidden_states=hidden_states, **kwargs)


def test_a_student_equal_to_its_teacher_scores_nothing(make_teacher, make_student, block) -> None:
    teacher = make_teacher()
    pair = Pair(make_student(teacher), copy.deepcopy(teacher), NEW_MIXERS)
    for index in pair.converted:
        pair.student.model.layers[index].self_attn = Inherited(
            copy.deepcopy(teacher.model.layers[index].self_attn)
        )
    loss, parts = Matching(pair)(*block)
    assert parts["hidden"].item() == 0
    assert abs(parts["kl"].item()) <= 1e-7 and abs(loss.item()) <= 1e-7
    assert parts["agreement"].item() == 1


def test_layers_below_the_first_difference_run_once(make_teacher, make_student, block) -> None:
    teacher = make_teacher()
    for train, first in (((), 2), (("model.layers.1.mlp.down_proj.weight",), 1)):
        pair = Pair(make_student(teacher), copy.deepcopy(teacher), [*NEW_MIXERS, *train])
        assert pair.first_difference == first
        calls = []
        for index, layer in enumerate(pair.student.model.layers):
            # Frozen, so that both streams pass through this very module.
            layer.pre_feedforward_layernorm.register_forward_hook(
                lambda *_, index=index, calls=calls: calls.append(index)
            )
        Matching(pair)(*block)
        assert [calls.count(index) for index in range(9)] == [1] * first + [2] * (9 - first)


def test_the_teacher_keeps_no_graph(make_teacher, make_student, block) -> None:
    """Two teacher passes a step cost no memory for the backward: only the student's stream is in the graph."""
    teacher = make_teacher()
    pair = Pair(make_student(teacher), copy.deepcopy(teacher), NEW_MIXERS)
    hidden_BTD, stream = pair.prepare(*block)
    for index in range(9):
        hidden_BTD = pair.teacher_layer(index, hidden_BTD, stream)
        assert not hidden_BTD.requires_grad
    assert not any(t.requires_grad for pair_ in stream.shared_attention.values() for t in pair_)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sliding_layers_in_blocks_are_the_dense_formula(make_teacher, make_student, checkpointing) -> None:
    """Rows of several blocks and documents; the sliding layers train too, so that their gradient is seen as well."""
    teacher = make_teacher(torch.float64)
    student = make_student(teacher, share_kv="teacher")
    naive = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(3)
    tokens_BT = torch.randint(3, 97, (2, 150), generator=generator)
    positions_BT = torch.stack([torch.cat([torch.arange(n), torch.arange(150 - n)]) for n in (70, 11)])
    pair = Pair(student, copy.deepcopy(teacher), [*NEW_MIXERS, SLIDING, LENT])
    masks = pair.prepare(tokens_BT, positions_BT)[1].masks
    assert isinstance(masks["sliding_attention"], Window)
    expected = dense(teacher, naive, tokens_BT, positions_BT, pair.first_difference)
    expected["loss"].backward()
    loss, parts = Matching(pair, checkpointing=checkpointing, kept_layers=4)(tokens_BT, positions_BT)
    loss.backward()
    torch.testing.assert_close(parts | {"loss": loss}, expected, rtol=1e-9, atol=1e-12)
    gradients = dict(naive.named_parameters())
    for name, parameter in pair.trained.items():
        assert relative_error(parameter.grad, gradients[name].grad) <= 1e-8, name


def test_kept_layers_are_not_recomputed(make_teacher, make_student, block) -> None:
    teacher = make_teacher()
    pair = Pair(make_student(teacher), copy.deepcopy(teacher), NEW_MIXERS)
    calls = []
    for index, layer in enumerate(pair.student.model.layers):
        layer.pre_feedforward_layernorm.register_forward_hook(lambda *_, index=index: calls.append(index))
    Matching(pair, checkpointing=True, kept_layers=3)(*block)[0].backward()
    # The teacher once, the student once, and once more below the three at the top; both part at layer 2.
    assert [calls.count(index) for index in range(9)] == [1] * 2 + [3] * 4 + [2] * 3


def test_packed_documents_are_separate_documents(make_teacher, make_student, block) -> None:
    teacher = make_teacher(torch.float64)
    pair = Pair(make_student(teacher, share_kv="teacher"), copy.deepcopy(teacher), NEW_MIXERS)
    matching = Matching(pair)
    tokens, positions = (x.split([9, 15], 1) for x in block)
    with torch.no_grad():
        whole = matching(*block)[1]["kl"]
        parts = [matching(*part)[1]["kl"] for part in zip(tokens, positions, strict=True)]
    assert relative_error(whole, (9 * parts[0] + 15 * parts[1]) / 24) <= 1e-10


def test_task(make_teacher, make_student, make_batch) -> None:
    teacher = make_teacher()
    pair = Pair(make_student(teacher), copy.deepcopy(teacher), NEW_MIXERS)
    task = MatchTask(Matching(pair, alignment_weight=0.5))
    loss, metrics = task.loss(make_batch(1))
    assert (
        task.parameters() is pair.trained
        and task.roles() == roles_of(pair.student, pair.trained)
        and task.tokens(make_batch(1)) == 48
    )
    distances = {name: value for name, value in metrics.items() if name.startswith("hidden/")}
    assert set(metrics) == {"kl", "hidden", "agreement", *distances}
    assert list(distances) == [f"hidden/{index}" for index in range(2, 9)]
    assert torch.stack(list(distances.values())).mean().item() == pytest.approx(metrics["hidden"].item())
    assert not any(value.requires_grad for value in metrics.values())
    assert loss.item() == pytest.approx((metrics["kl"] + 0.5 * metrics["hidden"]).item())


def test_the_parts_of_a_batch_are_the_batch(make_teacher, make_student, make_batch) -> None:
    teacher = make_teacher(torch.float64)
    pair = Pair(make_student(teacher), copy.deepcopy(teacher), NEW_MIXERS)
    batch = make_batch(1)
    for task in (AlignTask(pair), MatchTask(Matching(pair))):
        parts = task.split(batch, 2)
        loss, metrics = task.loss(batch)
        found = [task.loss(part) for part in parts]
        assert relative_error(torch.stack([part[0] for part in found]).mean(), loss) <= 1e-10
        for name, number in metrics.items():
            assert relative_error(torch.stack([part[1][name] for part in found]).mean(), number) <= 1e-10
