"""The middle of a gated MLP on a GPU: parts of wider rows, and the gradient."""

import pytest
import torch

from trihybrid.ops.gated_gelu import gated_gelu, gated_gelu_reference
from trihybrid.testing import relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [256, 6144, 100])
def test_parts_of_wider_rows(width):
    gate, up = torch.randn(1, 777, 2 * width, device="cuda", dtype=torch.bfloat16).split(width, -1)
    with torch.no_grad():
        found = gated_gelu(gate, up)
    assert found.is_contiguous()
    assert relative_error(found, gated_gelu_reference(gate.double(), up.double())) < 2.5e-3


def test_gradients():
    gate, up, grad = (torch.randn(3, 1000, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = torch.autograd.grad(gated_gelu(*leaves), leaves, grad)
    expected = torch.autograd.grad(gated_gelu_reference(*wide), wide, grad.double())
    assert all(relative_error(x, y) < 2.5e-3 for x, y in zip(found, expected, strict=True))
