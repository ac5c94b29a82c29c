"""Both stages on teachers without a post-norm, without a softcap, with windows of the student's own and with biases.

Legend: B batch, T tokens, D model width.
"""

import copy

import pytest
import torch
from torch import Tensor

from distances import distance
from tiny_teachers import LAYERS, TEACHERS, build_student, build_teacher
from trihybrid.distill.align import Alignment
from trihybrid.distill.match import Matching
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.distill.trained import roles_of
from trihybrid.models.anatomy import anatomy
from trihybrid.surgery.calibrate import record_layers
from trihybrid.testing import relative_error

# Every kind of slot; in families with windows W is their own sliding layer, or a global one that became one.
LAYOUTS = dict.fromkeys(TEACHERS, "WRWB") | {"gemma3": ".B.W", "qwen3-windowed": "WB.R"}


def couple(name: str, *train: str, dtype: torch.dtype = torch.float64):
    """Teacher, a student that shares all that it keeps, a copy of it, and the pair."""
    teacher = build_teacher(name, dtype)
    student = build_student(name, LAYOUTS[name])
    for parameter in student.parameters():
        parameter.data = parameter.data.to(dtype)
    student.load_state_dict(teacher.state_dict(), strict=False)
    if name == "qwen3-experts":
        # Of the ways to compute experts the only one in float64.
        teacher.set_experts_implementation("eager")
        student.set_experts_implementation("eager")
    naive = copy.deepcopy(student)
    return teacher, naive, Pair(student, copy.deepcopy(teacher), [*NEW_MIXERS, *train])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TEACHERS)
def test_stage_one_compares_what_the_residual_stream_receives(name, block, checkpointing) -> None:
    """|y_S - y_T|^2 / |y_T|^2 of the bare outputs without a post-norm, of the normed ones with it; windows that the
    student alone has take no part."""
    teacher, naive, pair = couple(name)
    slots = [index for index, slot in enumerate(naive.config.slot_list()) if slot.converted]
    records = record_layers(teacher.model, [block], slots)
    _, stream = naive.model.prepare(block[0], position_ids=block[1])
    expected = []
    for index in slots:
        layer = naive.model.layers[index]
        y_BTD = layer.self_attn.mix(records[index].inputs[0], stream.span, stream.shared, None)
        target_BTD = records[index].outputs[0]
        if name == "gemma3":
            y_BTD, target_BTD = (layer.post_attention_layernorm(y) for y in (y_BTD, target_BTD))
        expected.append(distance(y_BTD, target_BTD.detach()))
    torch.stack(expected).mean().backward()
    loss, losses = Alignment(pair, checkpointing)(*block)
    loss.backward()
    assert list(losses) == [f"alignment/{index}" for index in slots]
    torch.testing.assert_close(list(losses.values()), expected, rtol=1e-10, atol=0)
    wanted = dict(naive.named_parameters())
    for key, parameter in pair.trained.items():
        assert relative_error(parameter.grad, wanted[key].grad) <= 1e-8, key


@torch.no_grad()
def test_without_a_post_norm_the_scale_of_an_output_matters(block) -> None:
    """Gemma's post-norm forgets it; a bare output 100 times too large is 100 times too far."""
    _, _, pair = couple("llama")
    before = Alignment(pair)(*block)[1]
    for index in pair.converted:
        pair.student.model.layers[index].self_attn.rwkv7.output.weight.mul_(100)
    after = Alignment(pair)(*block)[1]
    assert all(after[key] > 50 * before[key] for key in before)


def states_and_logits(model, block: tuple[Tensor, Tensor]) -> tuple[list[Tensor], Tensor]:
    states: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, arguments, output: states.append(output.clone()))
        for layer in model.model.layers
    ]
    logits = model(block[0], position_ids=block[1], use_cache=False).logits
    for handle in handles:
        handle.remove()
    return states, logits


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TEACHERS)
def test_stage_two_is_the_dense_formula_of_two_whole_models(name, block, checkpointing) -> None:
    """Plain KL without a softcap. The teacher's stream passes windows of the student's own as the full layers that they
    were; projections of such a layer train too, beside a twin."""
    retained = "model.layers.2.self_attn.q_proj.*"
    teacher, naive, pair = couple(name, retained)
    with torch.no_grad():
        teacher_states, teacher_BTV = states_and_logits(teacher, block)
    student_states, student_BTV = states_and_logits(naive, block)
    p, q = (x.log_softmax(-1) for x in (teacher_BTV, student_BTV))
    first = next(i for i, slot in enumerate(naive.config.slot_list()) if slot.converted or slot.window)
    assert pair.first_difference == first
    distances = [distance(s, t) for s, t in list(zip(student_states, teacher_states, strict=True))[first:]]
    kl, hidden = (p.exp() * (p - q)).sum(-1).mean(), torch.stack(distances).mean()
    (kl + 0.1 * hidden).backward()
    loss, parts = Matching(pair, checkpointing=checkpointing, chunk=7)(*block)
    loss.backward()
    torch.testing.assert_close(parts["kl"], kl, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts["hidden"], hidden, rtol=1e-9, atol=1e-12)
    wanted = dict(naive.named_parameters())
    for key, parameter in pair.trained.items():
        assert relative_error(parameter.grad, wanted[key].grad) <= 1e-8, key
    assert all(p.grad is None for key, p in pair.student.named_parameters() if key not in pair.trained)


@pytest.mark.parametrize("name", TEACHERS)
def test_everything_frozen_is_one_tensor(name) -> None:
    _, _, pair = couple(name)
    places = {parameter.data_ptr() for parameter in pair.student.parameters()}
    own = {
        f"{key}.{part}"
        for key, layer in pair.teacher_layers.items()
        for part, parameter in layer.named_parameters()
        if parameter.data_ptr() not in places
    }
    assert {int(part.split(".")[0]) for part in own} == set(pair.converted)
    assert all(".self_attn.attention." in part for part in own)


@torch.no_grad()
@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_streams_are_the_stock_models_to_the_bit(name, dtype, block) -> None:
    """Also where norms, biases and projections of retained layers have float32 master weights in a bfloat16 model."""
    train = ("model.layers.*_layernorm.weight", "model.layers.2.self_attn.*", "model.layers.1.mlp.*_proj.*")
    teacher, naive, pair = couple(name, *train, dtype=dtype)
    expected = [states_and_logits(model, block)[1] for model in (teacher, naive)]
    model = pair.student
    hidden, stream = pair.prepare(*block)
    ours = stream.fork()
    student = hidden
    for index in range(LAYERS):
        hidden = pair.teacher_layer(index, hidden, stream)
        student = model.model.layer(index, student, ours)
        assert student.dtype == dtype
    cap = anatomy(teacher.config).softcap
    for found, wanted in ((hidden, expected[0]), (student, expected[1])):
        logits = model.lm_head(model.model.norm(found))
        assert torch.equal(logits if cap is None else cap * torch.tanh(logits / cap), wanted)
    assert not torch.equal(*expected)
    assert {p.dtype for p in pair.trained.values()} == {torch.float32}


def test_master_weights_of_a_bfloat16_llama_get_gradients(block) -> None:
    """Its norms answer in the dtype of their weight unless they are told otherwise; its projections have biases."""
    _, _, pair = couple("llama-biased", "model.layers.2.*", dtype=torch.bfloat16)
    again = Pair(
        pair.student, build_teacher("llama-biased", torch.bfloat16), [*NEW_MIXERS, "model.layers.2.*"]
    )
    loss, _ = Matching(again)(*block)
    loss.backward()
    assert "model.layers.2.self_attn.q_proj.bias" in again.trained
    assert "model.layers.2.input_layernorm.weight" in again.trained
    for key, parameter in again.trained.items():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, key
    roles = roles_of(again.student, again.trained)
    assert roles["model.layers.1.self_attn.rwkv7.key.bias"] == "vector"
    assert roles["model.layers.2.self_attn.q_proj.bias"] == "vector"


@pytest.mark.parametrize("part", ["experts.gate_up_proj", "gate.weight"])
def test_experts_and_routers_have_no_master_weights(part) -> None:
    """They train where the model is float32, and are refused by name where it is not."""
    name = f"model.layers.0.mlp.{part}"
    assert name in couple("qwen3-experts", name, dtype=torch.float32)[2].trained
    with pytest.raises(
        ValueError, match=rf"matches {name}, which has no float32 master weight .* leave experts"
    ):
        couple("qwen3-experts", name, dtype=torch.bfloat16)


def test_another_head_is_another_teacher() -> None:
    teacher, naive, _ = couple("qwen2")
    with torch.no_grad():
        teacher.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight: the teacher's tensor is not the student's"):
        Pair(naive, teacher, NEW_MIXERS)


def test_alignment_without_a_converted_slot_is_refused() -> None:
    teacher, student = build_teacher("llama"), build_student("llama", "WFWF")
    student.load_state_dict(teacher.state_dict())
    pair = Pair(student, teacher, ["model.layers.0.self_attn.*"])
    assert pair.first_difference == 0 and pair.converted == []
    with pytest.raises(ValueError, match=r"stage align: no slot holds rwkv7 or tica; leave the stage out"):
        Alignment(pair)
