"""Legend: B batch, T tokens, D model width, V vocabulary."""

import copy

import pytest
import torch
from torch import Tensor

from trihybrid.distill.match import Matching
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS, AlignSection, MatchSection
from trihybrid.distill.trained import roles_of
from trihybrid.mixers.contract import ROLES, Mixer
from trihybrid.ops.softcap import softcap

CONVERTED = (2, 5, 8)
SLIDING = "model.layers.3.self_attn.q_proj.weight"


def pair_of(teacher, student, *train: str) -> Pair:
    return Pair(student, copy.deepcopy(teacher), [*NEW_MIXERS, *train])


@torch.no_grad()
def teacher_logits(pair: Pair, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
    hidden_BTD, stream = pair.prepare(tokens_BT, positions_BT)
    for index in range(len(pair.student.model.layers)):
        hidden_BTD = pair.teacher_layer(index, hidden_BTD, stream)
    model = pair.student
    return softcap(model.lm_head(model.model.norm(hidden_BTD)), model.config.final_logit_softcapping)


@torch.no_grad()
def student_logits(pair: Pair, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Layer by layer on a forked stream, as `Matching` runs it."""
    hidden_BTD, stream = pair.prepare(tokens_BT, positions_BT)
    ours = stream.fork()
    for index in range(len(pair.student.model.layers)):
        hidden_BTD = pair.student.model.layer(index, hidden_BTD, ours)
    model = pair.student
    return softcap(model.lm_head(model.model.norm(hidden_BTD)), model.config.final_logit_softcapping)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "train", [(), ("model.layers.3.self_attn.*",), ("model.layers.*.mlp.*", "*_layernorm.weight")]
)
def test_both_streams_are_the_stock_models_to_the_bit(
    make_teacher, make_student, block, dtype, train
) -> None:
    teacher = make_teacher(dtype)
    student = make_student(teacher)
    tokens_BT, positions_BT = block
    with torch.no_grad():
        expected = [
            m(tokens_BT, position_ids=positions_BT, use_cache=False).logits for m in (teacher, student)
        ]
    pair = pair_of(teacher, student, *train)
    assert torch.equal(teacher_logits(pair, *block), expected[0])
    assert torch.equal(student_logits(pair, *block), expected[1])
    assert not torch.equal(*expected)


@pytest.mark.parametrize("train", [(), (SLIDING,), ("model.layers.*.mlp.*",)])
def test_everything_frozen_is_one_tensor(make_teacher, make_student, train) -> None:
    """The teacher keeps its converted attentions and a twin of every tensor that trains, and nothing else."""
    pair = pair_of(make_teacher(), make_student(make_teacher()), *train)
    student = dict(pair.student.named_parameters())
    assert {n for n, p in student.items() if p.requires_grad} == set(pair.trained)
    places = {p.data_ptr() for p in student.values()}
    own = set()
    for key, layer in pair.teacher_layers.items():
        for name, parameter in layer.named_parameters():
            if parameter.data_ptr() not in places:
                own.add(f"model.layers.{key}.{name}")
    twins = {name for name in own if ".self_attn.attention." not in name}
    assert twins == {name for name in pair.trained if "rwkv7" not in name and "tica" not in name}
    assert {int(name.split(".")[2]) for name in own - twins} == set(CONVERTED)
    assert not any(p.requires_grad for layer in pair.teacher_layers.values() for p in layer.parameters())


def test_a_trained_retained_tensor_leaves_its_twin_alone(make_teacher, make_student, block) -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    with torch.no_grad():
        expected = teacher(block[0], position_ids=block[1], use_cache=False).logits
    pair = pair_of(teacher, student, SLIDING)
    assert pair.first_difference == 2
    loss, _ = Matching(pair)(*block)
    loss.backward()
    assert pair.trained[SLIDING].grad.norm() > 0
    with torch.no_grad():
        pair.trained[SLIDING].add_(0.3)
    assert torch.equal(teacher_logits(pair, *block), expected)
    assert torch.equal(
        pair.teacher_layers["3"].self_attn.q_proj.weight, teacher.model.layers[3].self_attn.q_proj.weight
    )


def test_master_weights_are_float32_and_the_rest_stays(make_teacher, make_student, block) -> None:
    teacher = make_teacher(torch.bfloat16)
    pair = pair_of(teacher, make_student(teacher), SLIDING, "model.layers.3.self_attn.q_norm.weight")
    assert {p.dtype for p in pair.trained.values()} == {torch.float32}
    assert {p.dtype for n, p in pair.student.named_parameters() if n not in pair.trained} == {torch.bfloat16}
    assert {t.dtype for n, t in pair.student.named_buffers() if n.endswith("inv_freq")} == {torch.float32}
    loss, _ = Matching(pair)(*block)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in pair.trained.values())
    # The next stage goes on with the same tensors.
    again = pair_of(teacher, pair.student, SLIDING, "model.layers.3.self_attn.q_norm.weight")
    assert all(again.trained[name] is parameter for name, parameter in pair.trained.items())


def test_a_part_that_has_trained_cannot_be_frozen_again(make_teacher, make_student) -> None:
    """Its teacher would have to keep a twin of a frozen tensor, which is the sign of a wrong teacher."""
    teacher = make_teacher()
    pair = pair_of(teacher, make_student(teacher), SLIDING)
    with torch.no_grad():
        pair.trained[SLIDING].add_(0.1)
    with pytest.raises(ValueError, match=SLIDING):
        pair_of(teacher, pair.student)


def test_frozen_parameters_get_no_gradient(make_teacher, make_student, block) -> None:
    teacher = make_teacher()
    pair = pair_of(teacher, make_student(teacher))
    loss, _ = Matching(pair)(*block)
    loss.backward()
    graded = {name for name, p in pair.student.named_parameters() if p.grad is not None}
    assert graded == set(pair.trained)
    assert all(
        p.grad is None
        for layer in pair.teacher_layers.values()
        for n, p in layer.named_parameters()
        if "attention" in n
    )
    assert all(torch.isfinite(p.grad).all() for p in pair.trained.values())


def test_roles_cover_what_trains(make_teacher, make_student) -> None:
    teacher = make_teacher()
    pair = pair_of(teacher, make_student(teacher), "model.layers.3.*")
    roles = roles_of(pair.student, pair.trained)
    assert roles.keys() == pair.trained.keys() and set(roles.values()) <= set(ROLES)
    prefix = "model.layers.5.self_attn"
    assert roles[f"{prefix}.rwkv7.w0"] == "decay"
    assert roles[f"{prefix}.rwkv7.w1"] == roles[f"{prefix}.tica.g2"] == "lowrank"
    assert (
        roles[f"{prefix}.rwkv7.r_norm.weight"] == roles["model.layers.3.input_layernorm.weight"] == "vector"
    )
    assert roles[f"{prefix}.tica.q_proj.weight"] == roles["model.layers.3.mlp.up_proj.weight"] == "matrix"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (["model.layers.*.attention.*"], r"matches no parameter of the student"),
        ([], r"train: \[\] matches no parameter"),
        (["*"], r"matches model\.embed_tokens.*; only layers may train, teacher and student share the rest"),
        (["model.norm.weight"], r"matches model\.norm\.weight; only layers may train"),
        ([*NEW_MIXERS, "model.embed_tokens.*"], r"matches model\.embed_tokens\.weight; only layers"),
    ],
)
def test_patterns_that_cannot_train_are_refused(make_teacher, make_student, train, message) -> None:
    with pytest.raises(ValueError, match=message):
        Pair(make_student(make_teacher()), make_teacher(), train)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "model.layers.1.layer_scalar",
        "model.norm.weight",
    ],
)
def test_another_teacher_is_refused_by_the_name_of_a_tensor(make_teacher, make_student, name) -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    tensors = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    with torch.no_grad():
        tensors[name].view(-1)[0] += 0.5
    with pytest.raises(ValueError, match=rf"{name}: the teacher's tensor is not the student's; this is not"):
        Pair(student, teacher, NEW_MIXERS)


def test_another_dtype_is_refused(make_teacher, make_student) -> None:
    student = make_student(make_teacher())
    with pytest.raises(
        ValueError, match=r"float64 in the teacher, torch.float32 in the student; load both in one dtype"
    ):
        Pair(student, make_teacher(torch.float64), NEW_MIXERS)


def test_sections_name_the_new_mixers_and_do_not_share_their_list(make_teacher, make_student) -> None:
    loop = {"loop": {"steps": 1}}
    align, match = AlignSection.model_validate(loop), MatchSection.model_validate(loop)
    assert align.train == match.train == NEW_MIXERS
    align.train.append("x")
    assert match.train == NEW_MIXERS and AlignSection.model_validate(loop).train == NEW_MIXERS
    pair = Pair(make_student(make_teacher()), make_teacher(), match.train)
    assert all(".rwkv7." in name or ".tica." in name for name in pair.trained)
    mixers = [module for module in pair.student.modules() if isinstance(module, Mixer)]
    assert len(pair.trained) == sum(len(list(mixer.parameters())) for mixer in mixers)
