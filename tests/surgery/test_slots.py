"""Legend: B batch, T tokens, D model width."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from trihybrid.mixers.contract import Shared
from trihybrid.mixers.span import packed
from trihybrid.models.anatomy import anatomy
from trihybrid.models.inventory import empty_teacher
from trihybrid.models.teacher.source import ModelSource
from trihybrid.surgery.calibrate import NOISE_TOKENS, noise, noise_record, record_layers
from trihybrid.surgery.inherit import rms
from trihybrid.surgery.layout import student_heads
from trihybrid.surgery.section import SurgerySection
from trihybrid.surgery.slots import build_slots
from trihybrid.surgery.weights import LayerWeights, read_layer
from trihybrid.testing import relative_error

CONVERTED = (2, 5, 8)
OWNERS = {2: 2, 5: 5, 8: 5}


def read(teacher, index: int) -> LayerWeights:
    empty = empty_teacher(teacher.config)
    return read_layer(ModelSource(teacher), empty, anatomy(teacher.config), index, torch.float32)


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return make_teacher()


@pytest.fixture
def build(teacher, make_section):
    def make(seed: int = 0, tokens=(), **fields) -> dict[int, dict[str, Tensor]]:
        section = make_section(**({"calibration_tokens": 0} | fields))
        slots = build_slots(ModelSource(teacher), teacher.config, section, tokens, seed)
        return {built.index: dict(built.slot.named_parameters()) for built in slots}

    return make


@pytest.mark.parametrize("start", ["fresh", "inherited"])
def test_a_slot_does_not_depend_on_the_others(build, start) -> None:
    """Whatever else is converted, slot 5 is slot 5: it is drawn, filled and scaled by itself."""
    whole = build(start=start)
    assert list(whole) == [2, 5, 8]
    # A retained layer 8 would read the keys and values of layer 5.
    others = {"pattern": "SSFSSRSSR", "legend": {"S": "sliding", "F": "full", "R": ["rwkv7", "tica"]}}
    part = build(start=start, **others)
    assert list(part) == [5, 8]
    for index in part:
        assert part[index].keys() == whole[index].keys()
        assert all(torch.equal(part[index][name], whole[index][name]) for name in whole[index])


def test_seeds_are_a_slots_own(build) -> None:
    one, other = build(seed=3), build(seed=4)
    for index in CONVERTED:
        assert not torch.equal(one[index]["rwkv7.w1"], other[index]["rwkv7.w1"])
    assert not torch.equal(one[2]["rwkv7.w1"], one[5]["rwkv7.w1"])
    assert not torch.equal(one[2]["tica.q_proj.weight"], one[5]["tica.q_proj.weight"])
    # Seed n + 1 of one slot is no other slot's seed n.
    assert not torch.equal(other[2]["rwkv7.w1"], one[5]["rwkv7.w1"])


def test_slots_are_built_when_they_are_asked_for(teacher, make_section, monkeypatch) -> None:
    source = ModelSource(teacher)
    read: list[str] = []
    plain = source.read
    monkeypatch.setattr(source, "read", lambda name: read.append(name) or plain(name))
    slots = build_slots(source, teacher.config, make_section(calibration_tokens=0))
    next(slots)
    assert "model.layers.2.self_attn.q_proj.weight" in read
    assert not any(name.startswith(("model.layers.5.", "model.layers.8.")) for name in read)


@torch.no_grad()
@pytest.mark.parametrize("keys", ["copy", "share"])
@pytest.mark.parametrize("gate", ["unit", "published"])
def test_on_noise_values_and_outputs_have_the_rms_that_they_are_scaled_to(
    teacher, make_section, gate, keys
) -> None:
    section = make_section(gate, calibration_tokens=0, donor_keys_values=keys)
    source = ModelSource(teacher)
    u_1TD = noise(32, 0, torch.empty(0))
    span, shared = packed(torch.arange(NOISE_TOKENS)[None]), Shared()
    for built in build_slots(source, teacher.config, section):
        x_1TD = u_1TD * teacher.model.layers[built.index].input_layernorm.weight
        single = teacher_alone(teacher, built.index, u_1TD)
        y_1TD = built.slot.mix(x_1TD, span, shared, None)
        assert rms(y_1TD) == pytest.approx(rms(single), rel=1e-4)
        if built.slot.rwkv7.donor is None:
            assert rms(x_1TD @ built.slot.rwkv7.value.weight.T) == pytest.approx(1.0, rel=1e-4)


@torch.no_grad()
def teacher_alone(teacher, index: int, u_1TD: Tensor) -> Tensor:
    """What the teacher's attention says of each token as a document of its own, its keys and values those of its
    owner, made of the same input."""
    owner = OWNERS[index]
    gain_D = teacher.model.layers[index].input_layernorm.weight
    x_T1D = (u_1TD * gain_D).transpose(0, 1)
    positions = torch.zeros(len(x_T1D), 1, dtype=torch.long)
    rotary = teacher.model.rotary_emb(x_T1D, positions, "full_attention")
    shared: dict = {}
    lender = teacher.model.layers[owner].self_attn
    own = lender(x_T1D, position_embeddings=rotary, attention_mask=None, shared_kv_states=shared)[0]
    if owner == index:
        return own.transpose(0, 1)
    found = teacher.model.layers[index].self_attn(
        x_T1D, position_embeddings=rotary, attention_mask=None, shared_kv_states=shared
    )[0]
    return found.transpose(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"attention_k_eq_v": True, "num_global_key_value_heads": 2}])
@pytest.mark.parametrize("index", CONVERTED)
def test_the_record_of_noise_is_what_the_attention_says_of_tokens_alone(
    make_teacher, make_section, shape, index
) -> None:
    teacher = make_teacher(**shape)
    u_1TD = noise(32, 5, torch.empty(0))
    heads = student_heads(teacher.config, make_section())
    record = noise_record(u_1TD, read(teacher, index), heads, True, 1e-6)
    assert torch.equal(record.inputs[0], u_1TD * teacher.model.layers[index].input_layernorm.weight)
    assert relative_error(record.outputs[0], teacher_alone(teacher, index, u_1TD)) <= 1e-5


def test_noise_is_what_a_norm_lets_through() -> None:
    u_1TD = noise(48, 1, torch.empty(0, dtype=torch.float64))
    assert u_1TD.shape == (1, NOISE_TOKENS, 48) and u_1TD.dtype == torch.float64
    assert (u_1TD.pow(2).mean(-1) - 1).abs().max() < 1e-6
    assert u_1TD.mean().abs() < 0.1
    assert torch.equal(u_1TD, noise(48, 1, u_1TD)) and not torch.equal(u_1TD, noise(48, 2, u_1TD))


def test_the_scale_does_not_reach_the_next_layer(build, teacher, make_section, calibration) -> None:
    """Why any scale will do: the norm behind the slot takes it out again."""
    section = make_section(calibration_tokens=0)
    (built, *_) = build_slots(ModelSource(teacher), teacher.config, section)
    record = record_layers(teacher.model, [calibration], [2])[2]
    post = teacher.model.layers[2].post_attention_layernorm
    span = packed(calibration[1])
    with torch.no_grad():
        before = post(built.slot.mix(record.inputs[0], span, Shared(), None))
        built.slot.rwkv7.output.weight *= 3
        after = post(built.slot.mix(record.inputs[0], span, Shared(), None))
    assert relative_error(after, before) <= 1e-5


def test_text_and_noise_differ_in_scales_alone(build, calibration) -> None:
    text, weights = build(tokens=[calibration], calibration_tokens=256), build()
    for index in CONVERTED:
        for name, tensor in weights[index].items():
            other = text[index][name]
            if name in ("rwkv7.value.weight", "rwkv7.output.weight"):
                assert not torch.equal(tensor, other)
                assert relative_error(tensor / tensor.norm(), other / other.norm()) <= 1e-5
            else:
                assert torch.equal(tensor, other), name


def test_what_is_inherited_is_named(teacher, make_section) -> None:
    for start, keys in (("fresh", "copy"), ("inherited", "share")):
        section = make_section(start=start, donor_keys_values=keys, calibration_tokens=0)
        for built in build_slots(ModelSource(teacher), teacher.config, section):
            names = {name for name, _ in built.slot.named_parameters()}
            assert built.inherited < names
            own = {"receptance.weight", "r_norm.weight", "output.weight"}
            if built.slot.rwkv7.donor is None:
                own |= {"key.weight", "k_norm.weight", "value.weight"}
            wanted = {f"rwkv7.{name}" for name in own}
            if start == "inherited":
                wanted |= {f"tica.{part}_proj.weight" for part in "qkv"}
            assert built.inherited == wanted
            own_names = [f"layers.{built.index}.self_attn.{part}" for part in ("q_proj", "q_norm", "o_proj")]
            lent = [
                f"layers.{OWNERS[built.index]}.self_attn.{part}" for part in ("k_proj", "k_norm", "v_proj")
            ]
            assert built.sources == {f"model.{name}.weight" for name in own_names + lent}


def test_a_tica_that_starts_fresh_has_nothing_of_the_teacher(teacher, make_section) -> None:
    legend = {"S": "sliding", "R": "tica"}
    section = make_section(pattern="SSR * 3", legend=legend, calibration_tokens=0)
    for built in build_slots(ModelSource(teacher), teacher.config, section):
        assert not built.inherited and not built.sources


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"calibration_tokens": 255}, "calibration_tokens is 255; it must be 0 or at least 256"),
        (
            {"donor_keys_values": "ridge", "calibration_tokens": 0},
            'donor_keys_values is "ridge", which is fitted on text; set calibration_tokens',
        ),
    ],
)
def test_sections_that_ask_for_too_little_text_are_refused(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        SurgerySection(**fields)


def test_a_missing_tensor_is_named(teacher, make_section) -> None:
    source = ModelSource(teacher)
    del source._tensors["model.layers.5.self_attn.v_proj.weight"]
    slots = build_slots(source, teacher.config, make_section(calibration_tokens=0))
    assert next(slots).index == 2
    with pytest.raises(
        ValueError, match=r"the teacher has no tensor model\.layers\.5\.self_attn\.v_proj\.weight"
    ):
        next(slots)


def test_weights_are_read_in_the_dtype_that_is_computed_in(make_teacher) -> None:
    teacher = make_teacher(torch.bfloat16)
    attention = read(teacher, 8).attention
    assert attention.query.dtype == torch.float32
    assert attention.key is not None
    assert torch.equal(attention.key, teacher.model.layers[5].self_attn.k_proj.weight.float())
