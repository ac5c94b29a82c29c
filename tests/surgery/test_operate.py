"""Legend: B batch, T tokens, D model width."""

import itertools
import json

import pytest
import torch
from torch import nn

from trihybrid.mixers.contract import Shared
from trihybrid.mixers.span import packed
from trihybrid.models.checkpoint import load_model
from trihybrid.storage.folder import check_folder
from trihybrid.surgery.calibrate import record_layers
from trihybrid.surgery.inherit import rms
from trihybrid.surgery.operate import PLAN_FILE, operate, save_student
from trihybrid.surgery.plan import make_plan
from trihybrid.testing import relative_error

CONVERTED = (2, 5, 8)
CHOICES = [
    choice
    for place, choice in enumerate(
        itertools.product(
            ("copy", "ridge", "share"),
            ("own", "teacher"),
            ("fresh", "inherited"),
            ("permuted", "plain"),
            ("unit", "published"),
        )
    )
    # Half of them, in which any four of the five choices meet in every combination.
    if place.bit_count() % 2 == 0
]


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    ones, others = tensors_of(one), tensors_of(other)
    return ones.keys() == others.keys() and all(torch.equal(ones[n], others[n]) for n in ones)


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return make_teacher()


@pytest.fixture
def make(teacher, make_section, calibration):
    def build(seed: int = 0, **fields):
        plan = make_plan(teacher.config, make_section(**fields), "tiny", contexts=(64,))
        return operate(teacher, plan, [calibration], seed)

    return build


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_retained_tensors_are_the_teachers_to_the_bit(make_teacher, make_section, calibration, dtype) -> None:
    teacher = make_teacher(dtype)
    before = {name: tensor.clone() for name, tensor in tensors_of(teacher).items()}
    plan = make_plan(teacher.config, make_section(), "tiny", contexts=(64,))
    student = operate(teacher, plan, [calibration])
    found = tensors_of(student)
    ours = tuple(f"model.layers.{index}.self_attn." for index in CONVERTED)
    retained = [name for name in found if not name.startswith(ours)]
    assert sum(name.endswith("layer_scalar") for name in retained) == 9
    assert sum("inv_freq" in name for name in retained) >= 2
    for name in retained:
        assert found[name].dtype == before[name].dtype
        assert torch.equal(found[name], before[name]), name
        assert found[name].data_ptr() != tensors_of(teacher)[name].data_ptr(), name
    # What the student lacks is exactly the attention that it does not have any more.
    assert all(name.startswith(ours) for name in before.keys() - found.keys())
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert not student.training
    # The teacher is as it was.
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(teacher).items())


def test_student_of_a_bfloat16_teacher_keeps_rotary_frequencies_in_float32(
    make_teacher, make_section, calibration, tmp_path
) -> None:
    teacher = make_teacher(torch.bfloat16)
    plan = make_plan(teacher.config, make_section(), "tiny", contexts=(64,))
    student = operate(teacher, plan, [calibration])
    save_student(student, plan, tmp_path / "student")
    loaded = load_model(tmp_path / "student")
    for model in (student, loaded):
        assert model.dtype == torch.bfloat16
        frequencies = {n: t for n, t in model.named_buffers() if n.endswith("inv_freq")}
        assert len(frequencies) >= 2 and {t.dtype for t in frequencies.values()} == {torch.float32}
    tokens_BT, positions_BT = calibration
    with torch.no_grad():
        logits = [m(tokens_BT, position_ids=positions_BT, use_cache=False).logits for m in (student, loaded)]
    assert torch.equal(*logits)
    assert logits[0].dtype == torch.bfloat16 and logits[0].isfinite().all()


@pytest.fixture(scope="module")
def short_teacher(make_teacher):
    """Four layers; the last two read the keys and values of the first two."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return make_teacher(num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2)


@pytest.mark.parametrize(("keys", "share", "start", "heads", "gate"), CHOICES)
def test_every_choice_runs_and_loads_to_the_bit(
    short_teacher, make_section, tmp_path, calibration, keys, share, start, heads, gate
) -> None:
    section = make_section(gate, start, donor_keys_values=keys, share_kv=share, heads=heads)
    plan = make_plan(short_teacher.config, section, "tiny", contexts=(64,))
    student = operate(short_teacher, plan, [calibration])
    student.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert same_bits(student, loaded)
    tokens_BT, positions_BT = calibration
    with torch.no_grad():
        logits = student(tokens_BT, position_ids=positions_BT, use_cache=False).logits
        assert logits.isfinite().all()
        assert torch.equal(logits, loaded(tokens_BT, position_ids=positions_BT, use_cache=False).logits)
        # Three greedy steps over the cache say what one pass without it says.
        prompt = tokens_BT[:, :10]
        told = student.generate(
            prompt,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            attention_mask=torch.ones_like(prompt),
        )
        scores = student(told, use_cache=False).logits[:, 9:12]
        scores[..., 1] = -torch.inf  # the end of a text, which min_new_tokens forbids
        assert torch.equal(told[:, 10:], scores.argmax(-1))
    # Donors have no projections of their own.
    names = {name for name, _ in loaded.model.layers[3].self_attn.named_parameters()}
    assert ("rwkv7.key.weight" in names) == (keys != "share")
    assert ("tica.k_proj.weight" in names) == (share == "own")


@pytest.mark.parametrize("gate", ["unit", "published"])
@pytest.mark.parametrize("keys", ["copy", "ridge", "share"])
def test_slot_outputs_have_the_rms_of_the_teachers_attention(make, teacher, calibration, keys, gate) -> None:
    student = make(donor_keys_values=keys, gate=gate)
    records = record_layers(teacher.model, [calibration], CONVERTED)
    shared, span = Shared(), packed(calibration[1])
    for index in CONVERTED:
        slot = student.model.layers[index].self_attn
        with torch.no_grad():
            y_BTD = slot.mix(records[index].inputs[0], span, shared, None)
        assert rms(y_BTD) == pytest.approx(rms(records[index].outputs[0]), rel=1e-4)


@pytest.mark.parametrize("keys", ["copy", "ridge"])
def test_values_have_rms_one_as_behind_the_teachers_norm(make, teacher, calibration, keys) -> None:
    student = make(donor_keys_values=keys)
    records = record_layers(teacher.model, [calibration], CONVERTED)
    for index in CONVERTED:
        value = student.model.layers[index].self_attn.rwkv7.value.weight
        assert rms((records[index].inputs[0] @ value.T).detach()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    "shape", [{}, {"num_key_value_heads": 2}, {"attention_k_eq_v": True, "num_global_key_value_heads": 2}]
)
def test_inherited_projections_are_the_teachers_rows(make_teacher, make_section, calibration, shape) -> None:
    """Receptance and key, times their norm's weight, are the teacher's rows times its norm's weight: student head
    (g J + j) R + i holds block j of head g R + i, and keys of layer 8 come from layer 5."""
    teacher = make_teacher(**shape)
    plan = make_plan(teacher.config, make_section(), "tiny", contexts=(64,))
    student = operate(teacher, plan, [calibration])
    order = torch.cat([torch.arange(4), torch.arange(16, 20), torch.arange(4, 16), torch.arange(20, 32)])
    groups = shape.get("num_key_value_heads", shape.get("num_global_key_value_heads", 1))
    repeats = 4 // groups
    for index, owner in ((2, 2), (5, 5), (8, 5)):
        mixer = student.model.layers[index].self_attn.rwkv7
        own, lender = teacher.model.layers[index].self_attn, teacher.model.layers[owner].self_attn
        query = (own.q_proj.weight.view(4, 32, 32) * own.q_norm.weight[:, None])[:, order].view(4, 2, 16, 32)
        key = (lender.k_proj.weight.view(groups, 32, 32) * lender.k_norm.weight[:, None])[:, order].view(
            groups * 2, 16, 32
        )
        receptance = mixer.receptance.weight.view(8, 16, 32) * mixer.r_norm.weight[:, None]
        found_key = mixer.key.weight.view(groups * 2, 16, 32) * mixer.k_norm.weight[:, None]
        torch.testing.assert_close(found_key, key)
        output = mixer.output.weight.view(32, 8, 16)
        theirs = own.o_proj.weight.view(32, 4, 2, 16)
        scale = (output.norm() / theirs.norm()).item()
        value = (lender.k_proj if lender.v_proj is None else lender.v_proj).weight
        torch.testing.assert_close(mixer.value.weight / mixer.value.weight.norm(), value / value.norm())
        for group, block, member in itertools.product(range(groups), range(2), range(repeats)):
            head, teacher_head = (group * 2 + block) * repeats + member, group * repeats + member
            torch.testing.assert_close(receptance[head], query[teacher_head, block])
            torch.testing.assert_close(output[:, head], theirs[:, teacher_head, block] * scale)


@torch.no_grad()
def test_inherited_tica_reads_content_channels_only(make, teacher) -> None:
    student = make(start="inherited")
    content = [*range(4, 16), *range(20, 32)]
    attention = teacher.model.layers[5].self_attn
    key = attention.k_proj.weight * (attention.k_norm.weight / rms(attention.k_norm.weight))[:, None]
    for index in (5, 8):
        tica = student.model.layers[index].self_attn.tica
        for group in range(2):
            block = content[group * 8 : (group + 1) * 8]
            torch.testing.assert_close(tica.k_proj.weight[group * 8 : (group + 1) * 8], key[block])
            value = attention.v_proj.weight[block]
            torch.testing.assert_close(tica.v_proj.weight[group * 8 : (group + 1) * 8], value)
            own = teacher.model.layers[index].self_attn
            for member in range(2):
                head = group * 2 + member
                rows = own.q_proj.weight.view(4, 32, 32)[head, block]
                expected = rows * (own.q_norm.weight / rms(own.q_norm.weight))[block, None]
                torch.testing.assert_close(tica.q_proj.weight[head * 8 : (head + 1) * 8], expected)
        assert not tica.o_proj.weight.any()


def test_inherited_tica_that_finds_no_content_channels_is_refused(
    make_teacher, make_section, calibration
) -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 1.0, "rope_theta": 1e6},
    }
    teacher = make_teacher(rope_parameters=rope)
    section = make_section(start="inherited", heads="plain")
    plan = make_plan(teacher.config, section, "tiny", contexts=(64,))
    with pytest.raises(
        ValueError, match=r'tica.start is "inherited": 0 channels .* lower it, or start fresh'
    ):
        operate(teacher, plan, [calibration])


def test_a_fresh_gate_of_one_leaves_the_output_projection_alone(make) -> None:
    mixer = make().model.layers[5].self_attn.rwkv7
    gate_BC = torch.sigmoid(torch.randn(7, 32) @ mixer.g1) @ mixer.g2
    torch.testing.assert_close(gate_BC, torch.ones_like(gate_BC))
    published = make(gate="published").model.layers[5].self_attn.rwkv7
    assert (torch.sigmoid(torch.randn(7, 32) @ published.g1) @ published.g2).abs().max() < 0.5


def test_seeds(make, teacher) -> None:
    one, same, other = make(seed=3), make(seed=3), make(seed=4)
    assert same_bits(one, same)
    differing = {n for n, t in tensors_of(other).items() if not torch.equal(t, tensors_of(one)[n])}
    assert "model.layers.2.self_attn.rwkv7.w1" in differing
    assert "model.layers.2.self_attn.tica.q_proj.weight" in differing
    # What is inherited and not scaled does not depend on the seed.
    assert not any(
        name.endswith(("receptance.weight", "key.weight", "value.weight", "norm.weight"))
        for name in differing
    )
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    make(seed=3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_plans_of_other_teachers_and_empty_calibration_are_refused(
    make_base, make_section, teacher, calibration
) -> None:
    foreign = make_plan(make_base(global_head_dim=64), make_section(), "wide", contexts=(64,))
    with pytest.raises(
        ValueError, match=r'made for teacher "wide", which has another shape; make a new plan'
    ):
        operate(teacher, foreign, [calibration])
    plan = make_plan(teacher.config, make_section(), "tiny", contexts=(64,))
    with pytest.raises(
        ValueError, match=r"calibration_tokens is 256; give at least one block of .* or set it to 0"
    ):
        operate(teacher, plan, [])
    weights = make_plan(teacher.config, make_section(calibration_tokens=0), "tiny", contexts=(64,))
    with pytest.raises(
        ValueError, match=r"calibration_tokens is 0: .* leave the tokens away, or set how many"
    ):
        operate(teacher, weights, [calibration])


def test_several_calibration_blocks_count_as_their_whole(make, teacher, make_section, calibration) -> None:
    tokens_BT, positions_BT = calibration
    plan = make_plan(teacher.config, make_section(donor_keys_values="ridge"), "tiny", contexts=(64,))
    rows = [(tokens_BT[i : i + 1], positions_BT[i : i + 1]) for i in range(2)]
    parts, whole = operate(teacher, plan, rows), make(donor_keys_values="ridge")
    for name, tensor in tensors_of(parts).items():
        torch.testing.assert_close(tensor, tensors_of(whole)[name], rtol=2e-4, atol=1e-6)


def test_calibration_blocks_may_differ_in_length(make_teacher, make_section, calibration) -> None:
    """Two documents of 17 and 23 tokens alone are the packed row of both."""
    teacher = make_teacher(torch.float64)
    tokens_BT, positions_BT = calibration
    plan = make_plan(teacher.config, make_section(donor_keys_values="ridge"), "tiny", contexts=(64,))
    packed_row = [(tokens_BT[:1], positions_BT[:1])]
    alone = [(part, torch.arange(part.shape[1])[None]) for part in tokens_BT[:1].split([17, 23], 1)]
    whole, parts = (operate(teacher, plan, blocks) for blocks in (packed_row, alone))
    for name, tensor in tensors_of(parts).items():
        assert relative_error(tensor, tensors_of(whole)[name]) < 1e-10, name


@torch.no_grad()
def test_ridge_regression_is_nearer_the_donor_than_the_copy(teacher, make_section, calibration) -> None:
    """On other tokens than those it was fitted on, as directions (both are rescaled)."""
    generator = torch.Generator().manual_seed(99)
    seen, held_out = (
        (torch.randint(3, 97, (12, 40), generator=generator), calibration[1][:1].expand(12, -1))
        for _ in range(2)
    )
    records = record_layers(teacher.model, [held_out], [5, 8])
    lender = teacher.model.layers[5].self_attn
    target = (records[5].inputs[0] @ lender.v_proj.weight.T).flatten()
    likeness = {}
    for keys in ("copy", "ridge"):
        plan = make_plan(teacher.config, make_section(donor_keys_values=keys), "tiny", contexts=(64,))
        value = operate(teacher, plan, [seen]).model.layers[8].self_attn.rwkv7.value.weight
        found = (records[8].inputs[0] @ value.T).flatten()
        likeness[keys] = torch.cosine_similarity(found, target, dim=0).item()
    assert likeness["ridge"] > likeness["copy"] + 0.02


def test_the_plan_travels_with_the_student(make, teacher, make_section, tmp_path) -> None:
    plan = make_plan(teacher.config, make_section(), "tiny", contexts=(64,))
    save_student(make(), plan, tmp_path / "student")
    assert json.loads((tmp_path / "student" / PLAN_FILE).read_text()) == plan
    assert check_folder(tmp_path / "student")["model_type"] == "trihybrid_gemma4"
    manifest = json.loads((tmp_path / "student" / "trihybrid.json").read_text())["files"]
    assert {PLAN_FILE, "config.json", "model.safetensors"} <= set(manifest)
    assert same_bits(load_model(tmp_path / "student"), make())
