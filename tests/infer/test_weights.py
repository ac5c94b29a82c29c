"""Quantised weights: which maps, how many bytes, how far the logits are, and what is refused."""

import importlib.util
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny_gemma4
from random_weights import randomise
from small_student import make_student
from trihybrid.infer import weights
from trihybrid.infer.engine import Engine
from trihybrid.infer.execution import GraphDecoder
from trihybrid.infer.network import Network
from trihybrid.infer.weights import Weights, quantise, tensor_bytes
from trihybrid.mixers.contract import Projection
from trihybrid.testing import relative_error

PROMPT = [(7 * place) % 57 + 3 for place in range(20)]
torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra quantize")


def teacher() -> PreTrainedModel:
    model = tiny_gemma4.build_teacher()
    randomise(model)
    return model


def logits(model: PreTrainedModel, kept: Weights) -> tuple[Tensor, Engine]:
    """Behind the prompt."""
    engine = Engine(model, chunk=16, weights=kept)
    pages, seen = engine._book.take(1), len(PROMPT) - 1
    with torch.inference_mode():
        engine._network.prefill(PROMPT[:seen], 0, 0, pages, logits=False)
        given = (torch.tensor([x]) for x in (PROMPT[seen], seen, pages))
        return engine._network.decode(*given)[0], engine


def test_a_name_that_is_not_there_and_a_missing_torchao_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='weights is "int2"; choose full, int8 or int4'):
        Engine(make_student(), weights="int2")  # type: ignore[arg-type]
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"which needs torchao: pip install 'trihybrid\[quantize\]'"):
        Engine(make_student(), weights="int4")


def test_full_weights_stay_what_they_are() -> None:
    layers = nn.ModuleList([nn.Linear(32, 16)])
    before = layers[0].weight
    quantise(layers, "full")
    assert layers[0].weight is before and tensor_bytes(before) == 32 * 16 * 4


@pytest.mark.long
@torchao
@pytest.mark.parametrize(("kept", "bound"), [("int8", 0.008), ("int4", 0.09)])
def test_a_map_is_what_its_rounded_weight_gives(kept: Weights, bound: float) -> None:
    """A step is a 127th of a row's largest in int8, a fifteenth of a group's range in int4, and a number is off by
    step / sqrt(12): of normal weights, whose largest of 128 is 2.6 and whose range of 32 is 4.1 standard
    deviations, 0.6 % and 8 %."""
    torch.manual_seed(0)
    plain, scaled = nn.Linear(128, 64), Projection(128, 64, scaled=True)
    nn.init.uniform_(scaled.scale, 0.5, 2)
    nn.init.normal_(plain.weight)
    nn.init.normal_(scaled.weight)
    layers = nn.ModuleList([plain, scaled]).requires_grad_(False)
    x = torch.randn(50, 128)
    wanted = [layer(x) for layer in layers]
    quantise(layers, kept)
    errors = [relative_error(layer(x), right) for layer, right in zip(layers, wanted, strict=True)]
    assert 1e-4 < min(errors) <= max(errors) < bound
    # Scales of a row in float32 and a byte of its zero; of a group in float32 two.
    size = {"int8": 128 + 5, "int4": 64 + 4 * 8}[kept]
    assert [tensor_bytes(layer.weight) for layer in layers] == [64 * size] * 2


@pytest.mark.long
@torchao
@pytest.mark.parametrize(("kept", "bound"), [("int8", 0.05), ("int4", 0.4)])
@pytest.mark.parametrize("build", [teacher, make_student])
def test_logits_are_near_and_only_linear_maps_change(
    build: Callable[[], PreTrainedModel], kept: Weights, bound: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Random weights at these widths are the worst case: rows of 16 to 64 numbers have no room for errors to cancel."""
    full_V, whole = logits(build(), "full")
    with caplog.at_level(logging.INFO):
        near_V, engine = logits(build(), kept)
    error = relative_error(near_V, full_V)
    print(f"{build.__name__}, {kept}: relative error of the logits {error:.3g}")
    assert 1e-4 < error < bound
    assert f"{kept}: " in caplog.text and "linear maps quantised" in caplog.text
    assert engine.memory()["weights"] < whole.memory()["weights"]
    model, before = engine._network.model, dict(build().named_parameters())
    changed = {
        name for name, parameter in model.named_parameters() if hasattr(parameter, "__tensor_flatten__")
    }
    assert changed and all(".layers." in name and name.endswith(".weight") for name in changed)
    for name, parameter in model.named_parameters():
        if name not in changed:
            assert torch.equal(parameter, before[name]) or name.endswith("scale")
    sequence = engine.add(PROMPT, most=4)
    while engine.busy:
        engine.step()
    assert len(engine.tokens_of(sequence)) == len(PROMPT) + 4


@pytest.mark.gpu
@torchao
@pytest.mark.parametrize(("kept", "bound"), [("int8", 0.02), ("int4", 0.09)])
@torch.inference_mode()
def test_on_a_gpu_a_map_is_what_its_rounded_weight_gives(kept: Weights, bound: float) -> None:
    """The bounds of a CPU, and bfloat16's 0.4 % of inputs and outputs."""
    plain = nn.Linear(1024, 256, device="cuda", dtype=torch.bfloat16)
    nn.init.normal_(plain.weight)
    x = torch.randn(50, 1024, device="cuda", dtype=torch.bfloat16)
    wanted = x.double() @ plain.weight.double().T + plain.bias.double()
    quantise(nn.ModuleList([plain]).requires_grad_(False), kept)
    assert hasattr(plain.weight, "__tensor_flatten__")
    assert 3e-3 < relative_error(plain(x), wanted) < bound


@pytest.mark.gpu
@torchao
@pytest.mark.parametrize("kept", ["int8", "int4"])
@torch.inference_mode()
def test_on_a_gpu_a_recorded_step_is_the_plain_one(kept: Weights) -> None:
    """To the bit, over quantised maps as over others; and maps were quantised."""
    networks = [
        Network(teacher().to("cuda", torch.bfloat16), rows=1, length=4, weights=kept) for _ in range(2)
    ]
    for network in networks:
        network.states.grow(8)
    plain, recorded = networks
    assert any(hasattr(parameter, "__tensor_flatten__") for parameter in plain.model.parameters())
    decoder = GraphDecoder(recorded, recorded.decode)
    table_BM = torch.tensor([[1, 2, 3, 4]], device="cuda")
    for place in range(12):
        width = 1 << (place // 4).bit_length()
        ids_B, positions_B = (torch.tensor([number], device="cuda") for number in (place + 3, place))
        wanted_BV = plain.decode(ids_B, positions_B, table_BM[:, :width])
        assert torch.equal(decoder([place + 3], [place], [[1, 2, 3, 4]]), wanted_BV)
