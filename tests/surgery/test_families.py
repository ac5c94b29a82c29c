"""Scaled-down teachers with the structure of every family: convert, save, load, generate, one step of each stage.

Legend: B batch, T tokens.
"""

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import tiny_gemma4
import tiny_teachers
from tiny_gemma4 import VOCABULARY
from trihybrid.data import Batch
from trihybrid.distill.align import AlignTask
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.models.anatomy import anatomy
from trihybrid.models.cache import CACHE
from trihybrid.models.checkpoint import load_model, open_teacher
from trihybrid.models.families import family_of
from trihybrid.models.shapes import load_shape
from trihybrid.surgery.operate import operate, save_student
from trihybrid.surgery.plan import make_plan
from trihybrid.surgery.stream import stream_student
from trihybrid.testing import relative_error

NAMES = ["gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b"]
# Two groups of layers and, where the teacher shares, one of them shares.
LAYERS = {"gemma-4-e2b": 10, "gemma-4-e4b": 12}
WINDOWED = {"mixer": "sliding", "window": tiny_teachers.WINDOW}
# Teachers of other families: layouts with every kind of slot, or None for every global layer.
OTHERS = {
    "llama": "WRBR",
    "llama-biased": "FRWB",
    "mistral": "BRWR",
    "mistral-windowed": "SRSB",
    "qwen2": "WBRF",
    "qwen3": "RRRB",
    "qwen3-windowed": "RBSR",
    "qwen3-experts": "FBRF",
    "gemma3": None,
}
LEGEND = {"S": "sliding", "F": "full", "R": "rwkv7", "B": ["rwkv7", "tica"], "W": WINDOWED}


def scaled_down(name: str) -> dict[str, Any]:
    """Fields of the shape with its heads, kinds of layers and switches, and small widths."""
    shape = load_shape(name)
    layers = LAYERS.get(name, 12)
    sliding, full = (shape.per_layer_config[f"{kind}_attention"] for kind in ("sliding", "full"))
    return {
        "num_hidden_layers": layers,
        "layer_types": shape.layer_types[:layers],
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": sliding.num_key_value_heads,
        "num_global_key_value_heads": full.num_key_value_heads if shape.attention_k_eq_v else None,
        "attention_k_eq_v": shape.attention_k_eq_v,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_kv_shared_layers": layers // 2 if shape.num_kv_shared_layers else 0,
        "use_double_wide_mlp": shape.use_double_wide_mlp,
        "hidden_size_per_layer_input": 8 if shape.hidden_size_per_layer_input else 0,
        "use_bidirectional_attention": shape.use_bidirectional_attention,
        "enable_moe_block": shape.enable_moe_block,
        "num_experts": 16 if shape.enable_moe_block else None,
        "top_k_experts": shape.top_k_experts,
        "moe_intermediate_size": 12 if shape.enable_moe_block else None,
    }


@pytest.fixture(scope="module", params=[*NAMES, *OTHERS])
def pair(request, make_section, calibration):
    """A teacher and its plan and student."""
    if request.param in NAMES:
        teacher = tiny_gemma4.build_teacher(**scaled_down(request.param))
        section = make_section(share_kv="teacher")
    else:
        teacher = tiny_teachers.build_teacher(request.param)
        layout = OTHERS[request.param]
        section = make_section() if layout is None else make_section(pattern=layout, legend=LEGEND)
    section.rwkv7.head_dim = 8
    plan = make_plan(teacher.config, section, request.param, contexts=(64,))
    return teacher, plan, operate(teacher, plan, [calibration])


def test_the_student_is_of_the_teachers_family(pair) -> None:
    teacher, plan, student = pair
    family = family_of(teacher.config)
    assert type(teacher) is family.teacher and type(student) is family.student
    assert [slot.mixers for slot in student.config.slot_list()] == [
        tuple(row["after"]) for row in plan["layers"]
    ]


def test_what_is_kept_is_the_teachers(pair) -> None:
    teacher, plan, student = pair
    given = teacher.state_dict()
    ours = tuple(f"model.layers.{row['index']}.self_attn." for row in plan["layers"] if row["sources"])
    kept = [name for name in student.state_dict() if not name.startswith(ours)]
    assert all(torch.equal(student.state_dict()[name], given[name]) for name in kept)
    assert any("experts" in name for name in kept) == (anatomy(teacher.config).experts is not None)
    # What the teacher has and the student has not is attention of converted layers.
    assert all(name.startswith(ours) for name in given.keys() - student.state_dict().keys())


def test_parameters_are_those_of_the_plan(pair) -> None:
    teacher, plan, student = pair
    for model, side in ((teacher, "before"), (student, "after")):
        assert plan[side]["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_the_stream_writes_the_same_student(pair, calibration, tmp_path) -> None:
    """From the teacher's folder, to the bit; experts lie one by one in those of `qwen3_moe`."""
    teacher, plan, student = pair
    teacher.save_pretrained(tmp_path / "teacher")
    stored = load_file(tmp_path / "teacher" / "model.safetensors")
    assert any(".experts.0." in name for name in stored) == (teacher.config.model_type == "qwen3_moe")
    opened = open_teacher(tmp_path / "teacher")
    report = stream_student(opened, plan, tmp_path / "streamed", [calibration])
    save_student(student, plan, tmp_path / "memory")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "memory"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "memory")]
    for config in configs:
        del (
            config["base_config"]["architectures"],
            config["base_config"]["dtype"],
        )  # of a teacher that was saved
    assert configs[0] == configs[1]
    assert report.unused == []


@torch.no_grad()
def test_a_student_is_saved_loaded_and_generates(pair, tmp_path) -> None:
    _, plan, student = pair
    save_student(student, plan, tmp_path / "student")
    loaded = load_model(tmp_path / "student")
    tokens_BT = torch.randint(3, VOCABULARY, (2, 19))
    whole = student(tokens_BT).logits
    assert torch.equal(loaded(tokens_BT).logits, whole)
    found = loaded.generate(tokens_BT[:, :11], max_new_tokens=6, do_sample=False, eos_token_id=None)
    again = loaded.generate(
        tokens_BT[:, :11], max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False
    )
    assert torch.equal(found, again)
    cached = loaded(tokens_BT[:, :13], use_cache=True)
    rest = loaded(tokens_BT[:, 13:], **{CACHE: cached[CACHE]}, use_cache=True)
    assert relative_error(rest.logits, whole[:, 13:]) < 1e-5


@pytest.mark.parametrize("stage", ["align", "match"])
def test_a_step_of_each_stage_lowers_its_loss_and_moves_all_that_trains_alone(pair, stage) -> None:
    """Two steps: the zero of TICA's output projection keeps the first gradient from what stands before it."""
    teacher, _, student = pair
    student = copy.deepcopy(student)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    both = Pair(student, copy.deepcopy(teacher), NEW_MIXERS)
    task = AlignTask(both) if stage == "align" else MatchTask(Matching(both))
    tokens_BT = torch.randint(3, VOCABULARY, (2, 25))
    positions_BT = torch.cat([torch.arange(9), torch.arange(16)]).expand(2, -1)
    losses = []
    optimizer = torch.optim.AdamW(both.trained.values(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        loss, parts = task.loss(Batch(tokens_BT, positions_BT))
        losses.append(loss.item())
        assert loss.isfinite() and all(torch.isfinite(torch.as_tensor(part)) for part in parts.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    still = {n for n, p in both.trained.items() if torch.equal(p, before[n])}
    assert not still, still
    for name, tensor in student.state_dict().items():
        if name not in both.trained:
            assert torch.equal(tensor, before[name]), name


@torch.no_grad()
def test_a_student_is_causal(pair) -> None:
    """Large teachers let the tokens of an image see each other; text never does."""
    _, _, student = pair
    tokens_BT = torch.randint(3, VOCABULARY, (2, 19))
    flipped = tokens_BT.clone()
    flipped[:, 15] = (flipped[:, 15] + 1) % VOCABULARY
    before, after = student(tokens_BT).logits, student(flipped).logits
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15], after[:, 15])


@torch.no_grad()
def test_experts_are_computed_alike_in_kept_and_converted_layers(make_section, calibration) -> None:
    """Every layer follows the model's choice of what computes the experts, as the teacher's layers do."""
    teacher = tiny_gemma4.build_teacher(**scaled_down("gemma-4-26b-a4b"))
    plan = make_plan(teacher.config, make_section(), "tiny", contexts=(64,))
    student = operate(teacher, plan, [calibration])
    tokens_BT = torch.randint(3, VOCABULARY, (2, 9))
    found = []
    for implementation in ("eager", "batched_mm"):
        student.set_experts_implementation(implementation)
        found.append(student(tokens_BT).logits)
        layers = student.model.layers
        assert {layer.experts.config._experts_implementation for layer in layers} == {implementation}
    assert relative_error(found[1], found[0]) < 1e-5


def test_the_scaled_down_teachers_have_the_structure_of_the_large_ones() -> None:
    for name in NAMES:
        base = Gemma4TextConfig(**scaled_down(name), hidden_size=32)
        shape = load_shape(name)
        assert base.attention_k_eq_v == shape.attention_k_eq_v
        owners = anatomy(base).owners
        assert (owners == list(range(base.num_hidden_layers))) == (not shape.num_kv_shared_layers)
        ratio = [
            c.num_attention_heads // c.per_layer_config["full_attention"].num_key_value_heads
            for c in (base, shape)
        ]
        assert ratio[0] == ratio[1]
        with torch.device("meta"):
            layer = Gemma4ForCausalLM(base).model.layers[0]
        assert hasattr(layer, "experts") == shape.enable_moe_block
