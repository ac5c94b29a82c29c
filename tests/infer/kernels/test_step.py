"""A step by the kernels is the step of the network: logits and every state, over rings that have wrapped and pages."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

import tiny_gemma4
import tiny_teachers
from interpreted import MARKS
from random_weights import randomise
from small_student import make_student
from trihybrid.infer.kernels import KernelStep, refusal
from trihybrid.infer.network import Network
from trihybrid.ops.decode_product.sizes import Sizes
from trihybrid.testing import relative_error

PAGE, STEPS = 5, 3
SEEN = [19, 7, 1, 12, 4]


def build(name: str) -> PreTrainedModel:
    if name == "student-gemma4":
        model = make_student()
        randomise(model)
        return model
    if name == "gemma4":
        model = tiny_gemma4.build_teacher()
        randomise(model)
        return model
    if name == "gemma4-plain":
        changes = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True}
        model = tiny_gemma4.build_teacher(**changes)
        randomise(model)
        return model
    if name.startswith("student-"):
        layout = {"gemma3": ".BWR", "qwen3": "RTB."}[name[8:]]
        return tiny_teachers.build_student(name[8:], layout)
    return tiny_teachers.build_teacher(name)


def check(name: str, rows: int, bound: float) -> None:
    """Prompts of different lengths, then steps of both ways, each over states of its own."""
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(3, model.config.vocab_size, (rows, max(SEEN) + STEPS), generator=generator)
    pages = [[1 + row + rows * place for place in reversed(range(6))] for row in range(rows)]
    plain, other = (Network(copy.deepcopy(model), rows=rows, length=PAGE) for _ in range(2))
    assert refusal(other) is None
    step = KernelStep(other)
    for network in (plain, other):
        network.states.grow(6 * rows + 1)
        for row in range(rows):
            network.prefill(texts[row, : SEEN[row]].tolist(), row, 0, pages[row], logits=False)
    seen, table_BM = torch.tensor(SEEN[:rows]), torch.tensor(pages)
    for _ in range(STEPS):
        ids_B = texts[torch.arange(rows), seen]
        wanted_BV, found_BV = (decode(ids_B, seen, table_BM) for decode in (plain.decode, step))
        assert relative_error(found_BV, wanted_BV) < bound
        assert found_BV.dtype == wanted_BV.dtype
        seen = seen + 1
    for row in range(rows):
        right, states = plain.states.read_row(row), other.states.read_row(row)
        assert all(relative_error(states[part], right[part]) < bound for part in right)
    for layer, stored in plain.states.pages.items():
        found = other.states.pages[layer]
        assert relative_error(found.keys, stored.keys) < bound
        assert relative_error(found.values, stored.values) < bound


NAMES = ["gemma4", "gemma4-plain", "student-gemma4", "gemma3", "llama", "mistral-windowed", "qwen3-windowed"]
STUDENTS = ["student-gemma3", "student-qwen3"]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", [*NAMES, *STUDENTS])
@torch.inference_mode()
def test_is_the_networks_step(name: str, rows: int) -> None:
    check(name, rows, 1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen2", "layer 0: self_attn.q_proj has a bias"),
        ("llama-biased", "has a bias"),
        ("qwen3-experts", "its layers choose experts"),
    ],
)
def test_what_is_not_taken_is_named(name: str, reason: str) -> None:
    assert reason in str(refusal(Network(tiny_teachers.build_teacher(name), rows=1, length=PAGE)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_base": 1e4}, "rwkv7.rope_base is 10000.0; null is taken"),
        ({"value_residual_rank": 2}, "rwkv7.value_residual_rank is 2; 0 is taken"),
        ({"lora_input": "receptance"}, 'rwkv7.lora_input is "receptance"; "input" is taken'),
        ({"output_bias": True}, "self_attn.rwkv7.output has a bias"),
    ],
)
def test_options_that_are_not_taken_are_named(changes: dict, reason: str) -> None:
    base = make_student().config
    config = type(base)(**(base.to_dict() | {"rwkv7": base.rwkv7 | changes}))
    model = type(make_student())(config).eval()
    assert reason in str(refusal(Network(model, rows=1, length=PAGE)))


def test_maps_that_are_wrapped_are_named() -> None:
    """An adapter's map holds the plain one, whose weight alone would leave the adapter out."""

    class Wrapped(torch.nn.Linear):
        pass

    model = make_student()
    network = Network(model, rows=1, length=PAGE)
    model.model.layers[2].self_attn.o_proj = Wrapped(16, 16, bias=False)
    assert refusal(network) == "layer 2: self_attn.o_proj is a Wrapped; linear maps are taken"


def test_weights_are_held_once() -> None:
    model = make_student()
    network = Network(model, rows=1, length=PAGE)
    before = network.weight_bytes
    names = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    KernelStep(network)
    assert network.weight_bytes == before
    assert all(torch.equal(parameter, names[name]) for name, parameter in model.named_parameters())
    stored = {parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()}
    assert sum(p.untyped_storage().nbytes() for p in stored.values()) <= before


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize(
    "name", ["gemma4", "gemma4-plain", "student-gemma4", "gemma3", "llama", "student-qwen3"]
)
@torch.inference_mode()
def test_on_a_gpu_is_as_near_to_the_truth_as_the_network(name: str, rows: int) -> None:
    """In bfloat16, against float32 on the same rounded weights and states."""
    model = build(name).bfloat16()
    wide = Network(copy.deepcopy(model).float().to("cuda"), rows=rows, length=PAGE)
    plain, other = (Network(copy.deepcopy(model).to("cuda"), rows=rows, length=PAGE) for _ in range(2))
    step, generator = KernelStep(other), torch.Generator().manual_seed(1)
    ids_BS = torch.randint(3, model.config.vocab_size, (rows, 12), generator=generator).to("cuda")
    table_BM = torch.arange(1, 3 * rows + 1, device="cuda").view(rows, 3)
    for network in (wide, plain, other):
        network.states.grow(3 * rows + 1)
    errors = []
    for place in range(12):
        seen_B = torch.full((rows,), place, device="cuda")
        exact, near, found = (
            decode(ids_BS[:, place], seen_B, table_BM) for decode in (wide.decode, plain.decode, step)
        )
        errors.append([float(relative_error(logits, exact)) for logits in (near, found)])
    near, found = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert found < max(1.3 * near, 2e-2)


class TestInterpreted:
    """The kernels, in Triton's interpreter."""

    pytestmark = MARKS

    @pytest.mark.parametrize("rows", [1, 2, 5])
    @pytest.mark.parametrize("name", ["gemma4", "student-gemma4", "gemma3"])
    @torch.inference_mode()
    def test_is_the_networks_step(self, load, monkeypatch, name, rows):
        # Large blocks, of which the interpreter needs few; `tests/ops` has those of the tables.
        large = Sizes(32, 4, step=64, programs=1)
        for part in ("triton.product_sizes", "triton.normed_sizes", "several.several_sizes"):
            monkeypatch.setattr(f"trihybrid.ops.decode_product.{part}", lambda *shape: large)
        for room in ("decode_product", "attention_step", "recurrence_step"):
            load(f"trihybrid.ops.{room}")
        check(name, rows, 1e-5)
