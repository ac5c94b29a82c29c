"""What is left of a read is orthogonal to the token's own value; the kernels against the definition, on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.ops.exclude_value import exclude_own_value, exclude_own_value_reference, fusable
from trihybrid.testing import relative_error

WIDE = torch.float64


def test_the_definition_by_hand() -> None:
    o_BTHN = torch.tensor([[5.0, 10.0], [1.0, 2.0], [7.0, -1.0], [0.0, 4.0]], dtype=WIDE).view(1, 1, 4, 2)
    v_BTGN = torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=WIDE).view(1, 1, 2, 2)
    # Along u = (0.6, 0.8) lie 11 and 2.2 of the first two heads; the other two lose their second channel.
    expected = torch.tensor([[-1.6, 1.2], [-0.32, 0.24], [7.0, 0.0], [0.0, 0.0]], dtype=WIDE)
    torch.testing.assert_close(exclude_own_value(o_BTHN, v_BTGN), expected.view(1, 1, 4, 2))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.floats(1e-3, 1e3))
def test_nothing_is_left_along_the_value(groups: int, share: int, width: int, scale: float) -> None:
    torch.manual_seed(0)
    o_BTHN = torch.randn(2, 3, groups * share, width, dtype=WIDE)
    v_BTGN = torch.randn(2, 3, groups, width, dtype=WIDE)
    left_BTHN = exclude_own_value(o_BTHN, v_BTGN)
    each_BTHN = v_BTGN.repeat_interleave(share, dim=2)
    assert (left_BTHN * each_BTHN).sum(-1).abs().max() < 1e-10
    # What was taken away lies along the value alone, and the value's length says nothing.
    taken_BTHN = o_BTHN - left_BTHN
    cosine_BTH = torch.nn.functional.cosine_similarity(taken_BTHN, each_BTHN, dim=-1).abs()
    torch.testing.assert_close(cosine_BTH, torch.ones_like(cosine_BTH))
    assert relative_error(exclude_own_value(o_BTHN, scale * v_BTGN), left_BTHN) < 1e-10


def test_a_value_of_zero_takes_nothing() -> None:
    o_BTHN = torch.randn(1, 2, 2, 4, dtype=WIDE)
    assert torch.equal(exclude_own_value(o_BTHN, torch.zeros(1, 2, 1, 4, dtype=WIDE)), o_BTHN)


def test_a_cpu_is_not_for_the_kernels() -> None:
    assert not fusable(torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 4, 64), (6, 2, 16), (3, 3, 128), (5, 1, 256)])
def test_the_kernels_are_the_definition(heads: int, groups: int, width: int) -> None:
    torch.manual_seed(0)
    o_BTHN = torch.randn(2, heads, 333, width, device="cuda").bfloat16().transpose(1, 2)
    v_BTGN = torch.randn(2, 333, groups, width, device="cuda").bfloat16()
    v_BTGN[0, 0] = 0
    leaves = [o_BTHN.requires_grad_(), v_BTGN.requires_grad_()]
    assert fusable(o_BTHN)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, reference = exclude_own_value(*leaves), exclude_own_value_reference(*wide)
    grad = torch.randn_like(reference).bfloat16()
    assert out.dtype == torch.bfloat16
    assert relative_error(out, reference) < 1e-2
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(reference, wide, grad.double())
    for gradient, expected in zip(ours, theirs, strict=True):
        assert relative_error(gradient, expected) < 1e-2
