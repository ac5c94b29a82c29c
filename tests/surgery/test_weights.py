"""A teacher's attention read by what its tensors do, and what recurrences make of it, family by family.

Legend: B batch, T tokens, D model width.
"""

import pytest
import torch
from torch import Tensor

import tiny_gemma4
from tiny_teachers import TEACHERS, build_teacher
from trihybrid.mixers.contract import Shared
from trihybrid.mixers.span import packed
from trihybrid.models.anatomy import anatomy
from trihybrid.surgery.calibrate import LayerRecord, record_layers
from trihybrid.surgery.inherit import rms
from trihybrid.surgery.operate import operate
from trihybrid.surgery.plan import make_plan
from trihybrid.surgery.section import SurgerySection
from trihybrid.surgery.weights import attention_weights
from trihybrid.testing import relative_error

CONVERTED = {"gemma3": (1, 3), "qwen3-windowed": (0, 1)}
LEGEND = {"S": "sliding", "F": "full", "R": "rwkv7"}


@pytest.fixture
def build(make_section, calibration):
    """Factory: teacher, head_dim -> a student of it (layers 1 and 3 converted, where the table says nothing else), and
    what its teacher's attentions heard and said."""

    def make(teacher, head_dim: int = 16, name: str = "tiny"):
        body = anatomy(teacher.config)
        converted = CONVERTED.get(name, (1, 3))
        letters = ["S" if kind == "sliding" else "F" for kind in body.kinds]
        for index in converted:
            letters[index] = "R"
        section: SurgerySection = make_section(pattern="".join(letters), legend=LEGEND)
        section.rwkv7.head_dim = head_dim
        plan = make_plan(teacher.config, section, name, contexts=(64,))
        student = operate(teacher, plan, [calibration])
        records = record_layers(teacher.model, [calibration], converted)
        return {index: (student.model.layers[index].self_attn, records[index]) for index in converted}

    return make


def heads_of(teacher, index: int, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values [B, T, heads, 16] as the teacher's attention has them before it turns them."""
    attention = teacher.model.layers[index].self_attn
    q, k, v = (
        getattr(attention, f"{letter}_proj")(x_BTD).unflatten(-1, (-1, 16)) for letter in ("q", "k", "v")
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v


@torch.no_grad()
def test_names_of_a_familys_tensors_by_what_they_do() -> None:
    for name in TEACHERS:
        teacher = build_teacher(name)
        body = anatomy(teacher.config)
        attention = teacher.model.layers[0].self_attn
        weights = attention_weights(dict(attention.named_parameters()).get, body)
        x_BTD = torch.randn(2, 5, 32)
        projected = torch.nn.functional.linear(x_BTD, weights.query, weights.query_bias).unflatten(
            -1, (-1, 16)
        )
        if weights.query_gain is not None:
            projected = (
                projected / (projected.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights.query_gain
            )
        assert relative_error(projected, heads_of(teacher, 0, x_BTD)[0]) < 1e-5, name
        assert (weights.key_gain is None) == (body.norm == "none")
        assert (weights.output_bias is None) == (not body.output_bias)


def test_keys_are_values_and_layers_that_have_neither() -> None:
    teacher = tiny_gemma4.build_teacher(attention_k_eq_v=True, num_global_key_value_heads=2)
    body = anatomy(teacher.config)
    full, reader = (
        attention_weights(dict(teacher.model.layers[index].self_attn.named_parameters()).get, body)
        for index in (2, 8)
    )
    assert full.value is full.key is not None
    assert reader.key is None and reader.value is None and reader.key_gain is None


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_heads_of_equal_width_map_one_to_one(build, name) -> None:
    """Student head h reads what teacher head h reads: queries and keys as directions, where the norm's gain is even;
    values to the last digit."""
    teacher = build_teacher(name)
    for layer in teacher.model.layers:
        for norm in ("q_norm", "k_norm"):
            if hasattr(layer.self_attn, norm):
                getattr(layer.self_attn, norm).weight.fill_(0.7)
    for index, (slot, record) in build(teacher, name=name).items():
        x_BTD = record.inputs[0]
        q, k, v = heads_of(teacher, index, x_BTD)
        mixer = slot.rwkv7
        r = mixer.r_norm(mixer.receptance(x_BTD).unflatten(-1, (-1, 16)))
        own_k = mixer.k_norm(mixer.key(x_BTD).unflatten(-1, (-1, 16)))
        assert (mixer.options.heads, mixer.options.kv_heads, mixer.options.head_dim) == (4, 2, 16)
        for ours, theirs in ((r, q), (own_k, k)):
            likeness = torch.cosine_similarity(ours, theirs, dim=-1)
            assert likeness.min() > 1 - 1e-5
        assert relative_error(mixer.value(x_BTD).unflatten(-1, (-1, 16)), v) < 1e-5
        columns = mixer.output.weight / mixer.output.weight.norm()
        theirs = teacher.model.layers[index].self_attn.o_proj.weight
        assert relative_error(columns, theirs / theirs.norm()) < 1e-5


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_scores_have_the_teachers_size(build, name) -> None:
    """The student's norms carry the size of the teacher's queries and keys, and the scale of its scores: by the gains
    of its norms, or by what its projections say on the calibration tokens."""
    teacher = build_teacher(name)
    for index, (slot, record) in build(teacher, name=name).items():
        q, k, _ = heads_of(teacher, index, record.inputs[0])
        scale = teacher.model.layers[index].self_attn.scaling
        mixer, gained = slot.rwkv7, anatomy(teacher.config).norm != "none"
        for norm, theirs, factor in ((mixer.r_norm, q, scale), (mixer.k_norm, k, 1.0)):
            assert bool((norm.weight == norm.weight[0]).all())
            # A gain that is not even makes the rms of normed queries differ a little from its own.
            size = rms(theirs) * factor
            assert norm.weight[0].item() == pytest.approx(size, rel=0.1 if gained else 1e-5)


@pytest.mark.parametrize("name", ["llama-biased", "qwen2"])
@torch.no_grad()
def test_biases_are_inherited(build, name) -> None:
    teacher = build_teacher(name)
    for index, (slot, record) in build(teacher, head_dim=8, name=name).items():
        theirs, mixer = teacher.model.layers[index].self_attn, slot.rwkv7
        assert mixer.receptance.bias is not None and mixer.value.bias is not None
        # Blocks of 8 of heads of 16, all of whose channels turn: pairs (c, c + 8), four a block.
        order = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15])
        key = theirs.k_proj.bias.view(2, 16)[:, order].flatten()
        assert torch.equal(mixer.key.bias, key)
        query = theirs.q_proj.bias.view(2, 2, 16)[..., order].view(2, 2, 2, 8).transpose(1, 2).flatten()
        assert torch.equal(mixer.receptance.bias, query)
        assert torch.equal(mixer.value.bias, theirs.v_proj.bias)
        x_BTD = record.inputs[0]
        assert relative_error(mixer.value(x_BTD), theirs.v_proj(x_BTD)) < 1e-6
        if name == "llama-biased":
            assert torch.equal(mixer.output.bias, theirs.o_proj.bias)
        else:
            assert mixer.output.bias is None


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_outputs_have_the_rms_of_the_teachers_beside_their_bias(build, calibration, name) -> None:
    def beside(y_BTD: Tensor, bias: Tensor | None) -> float:
        return rms(y_BTD if bias is None else y_BTD - bias)

    record: LayerRecord
    for slot, record in build(build_teacher(name), name=name).values():
        y_BTD = slot.mix(record.inputs[0], packed(calibration[1]), Shared(), None)
        bias = slot.rwkv7.output.bias
        assert beside(y_BTD, bias) == pytest.approx(beside(record.outputs[0], bias), rel=1e-4)


@torch.no_grad()
def test_a_norm_of_one_plus_weight_folds_one_plus_weight(build) -> None:
    teacher = build_teacher("gemma3")
    for index, (slot, _) in build(teacher, name="gemma3").items():
        theirs, mixer = teacher.model.layers[index].self_attn, slot.rwkv7
        gained = theirs.k_proj.weight.view(2, 16, 32) * (1 + theirs.k_norm.weight)[:, None]
        found = mixer.key.weight.view(2, 16, 32) * mixer.k_norm.weight[:, None]
        assert relative_error(found, gained) < 1e-6
        gained = theirs.q_proj.weight.view(4, 16, 32) * (1 + theirs.q_norm.weight)[:, None] * 24**-0.5
        found = mixer.receptance.weight.view(4, 16, 32) * mixer.r_norm.weight[:, None]
        assert relative_error(found, gained) < 1e-6


@torch.no_grad()
def test_inherited_tica_needs_channels_without_a_position(make_section, calibration) -> None:
    teacher = build_teacher("llama")
    section = make_section(start="inherited", pattern="FBFB", legend={"F": "full", "B": ["rwkv7", "tica"]})
    plan = make_plan(teacher.config, section, "tiny", contexts=(64,))
    with pytest.raises(ValueError, match=r"0 channels a head of the teacher have no rotary position"):
        operate(teacher, plan, [calibration])
