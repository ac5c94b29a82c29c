"""The window's kernels against the masked definition, on a GPU; what they refuse, everywhere."""

import pytest
import torch

from trihybrid.ops.block_attention import block_attention
from trihybrid.ops.window_attention import fits, window_attention
from trihybrid.testing.compare import relative_error

LENGTH = 256


def positions() -> torch.Tensor:
    """Two rows of documents, borders inside and between tiles."""
    lengths = ((100, 28, 1, 127), (64, 192))
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def test_a_cpu_or_wide_numbers_are_not_for_the_kernels():
    half = torch.zeros(1, 64, 2, 16, dtype=torch.bfloat16)
    assert not fits(half, half[:, :, :1])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [2, 63, 64, 65, 129, LENGTH])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 64), (2, 2, 16), (3, 1, 128)])
def test_outputs_and_gradients_are_those_of_the_mask(window, heads, groups, width):
    torch.manual_seed(0)
    queries, keys, values = (
        torch.randn(2, LENGTH, count, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for count in (heads, groups, groups)
    )
    leaves, positions_BT = (queries, keys, values), positions().cuda()
    assert fits(queries, keys)
    out = window_attention(*leaves, positions_BT, window, width**-0.5)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    reference = block_attention(*wide, positions_BT, True, window, width**-0.5)
    grad = torch.randn_like(reference).to(torch.bfloat16)
    assert relative_error(out, reference) < 5e-3
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(reference, wide, grad.double())
    for gradient, expected in zip(ours, theirs, strict=True):
        assert relative_error(gradient, expected) < 5e-3
