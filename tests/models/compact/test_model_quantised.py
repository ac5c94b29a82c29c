"""Fake quantisation inside a compact model: a switch that a compiled graph obeys, and only the roles that are named."""

import copy
import math

import pytest
import torch

from tiny_compact import LENGTH, build, tokens
from trihybrid.mixers.contract import Projection
from trihybrid.mixers.span import contiguous
from trihybrid.models.compact import CompactModel
from trihybrid.ops.fake_quantize import fake_quantize
from trihybrid.testing import relative_error


@pytest.fixture
def quantised() -> tuple[CompactModel, CompactModel]:
    """A model with fake quantisation, and its twin whose projections already have the rounded weights."""
    model = build(torch.float32, pattern="W", value_embedding_layers=[0], smear=False)
    twin = copy.deepcopy(model)
    model.enable_fake_quantise({"matrix": 3}, 2.5)
    with torch.no_grad():
        for projection in twin.projections().values():
            projection.weight.copy_(fake_quantize(projection.weight, 3, 2.5, None))
    return model, twin


def test_the_switch_reaches_a_compiled_graph(quantised: tuple[CompactModel, CompactModel]) -> None:
    model, twin = quantised
    tokens_BT = tokens()
    batch = (tokens_BT, tokens_BT.roll(-1, 1), contiguous(2, LENGTH))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
        plain = compiled(*batch)
        assert plain.item() == pytest.approx(model.loss(*batch).item(), rel=1e-6)
        model.set_quantisation(True)
        rounded = compiled(*batch)
        assert rounded.item() == pytest.approx(twin.loss(*batch).item(), rel=1e-5)
        assert abs(rounded.item() - plain.item()) > 1e-3
        rounded.backward()
        model.set_quantisation(False)
        assert compiled(*batch).item() == pytest.approx(plain.item(), rel=1e-6)
    torch._dynamo.reset()
    # Straight through: a weight's gradient is that of the rounded weight.
    twin.loss(*batch).backward()
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-4, name


def test_only_the_named_roles_are_rounded() -> None:
    model = build(torch.float32)
    model.enable_fake_quantise({"head": 2, "embedding": 2, "matrix": 16}, None)
    assert all(projection.quantiser is None for projection in model.projections().values())
    names, before = set(model.state_dict()), model(tokens()).logits
    model.enable_fake_quantise({"matrix": 6}, None)
    assert all(projection.quantiser is not None for projection in model.projections().values())
    assert set(model.state_dict()) == names
    assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize(
    ("bits", "clip", "message"),
    [(1, None, "bits is 1"), (9, None, "bits is 9"), (6, 0.0, "clip is 0.0"), (6, math.nan, "clip is nan")],
)
def test_quantisers_that_are_refused(bits: int, clip: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().enable_fake_quantise({"matrix": bits}, clip)


def test_a_projection_without_a_quantiser_is_a_matrix_product() -> None:
    projection = Projection(3, 5, scaled=True)
    torch.nn.init.normal_(projection.scale)
    x = torch.randn(2, 3)
    expected = x @ (projection.scale[:, None] * projection.weight).T
    assert relative_error(projection(x), expected) < 1e-6
    assert projection(x.bfloat16()).dtype == torch.bfloat16
