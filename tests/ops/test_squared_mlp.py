"""The fused MLP against its definition, on a GPU; the definition itself, everywhere."""

import pytest
import torch

from trihybrid.ops.squared_mlp import fusable, squared_mlp, squared_mlp_reference
from trihybrid.testing.compare import relative_error


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_the_definition_by_hand(slope):
    x, up, down = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[1.0, 1.0], [1.0, -1.0]]),
        torch.tensor([[1.0, 10.0]]),
    )
    # Inner values 3 and -1: squares 9 and slope^2.
    torch.testing.assert_close(squared_mlp_reference(x, up, down, slope), torch.tensor([[9 + 10 * slope**2]]))
    torch.testing.assert_close(squared_mlp(x, up, down, slope), squared_mlp_reference(x, up, down, slope))


def test_a_cpu_is_not_for_the_fused_product():
    assert not fusable(torch.zeros(128, 64, dtype=torch.bfloat16), (256, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize(("tokens", "width", "inner"), [(128, 64, 128), (384, 192, 768)])
def test_outputs_and_gradients_are_those_of_the_definition(slope, tokens, width, inner):
    torch.manual_seed(0)
    leaves = [
        (torch.randn(shape, device="cuda") * shape[-1] ** -0.5 * scale).bfloat16().requires_grad_()
        for shape, scale in (((2, tokens, width), width**0.5), ((inner, width), 1.0), ((width, inner), 1.0))
    ]
    if not fusable(leaves[0], leaves[1].shape):
        pytest.skip("the fused product is for Hopper")
    out = squared_mlp(*leaves, slope)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    reference = squared_mlp_reference(*wide, slope)
    grad = torch.randn_like(reference).to(torch.bfloat16)
    assert relative_error(out, reference) < 1e-2
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(reference, wide, grad.double())
    for gradient, expected in zip(ours, theirs, strict=True):
        assert relative_error(gradient, expected) < 1e-2
