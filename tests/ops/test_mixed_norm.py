"""The stream between two branches: by hand, against the operators that it joins, and the kernels on a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trihybrid.ops.mixed_norm import (
    fusable,
    mixed_blend,
    mixed_blend_reference,
    mixed_norm,
    mixed_norm_reference,
    scaled_norm,
)
from trihybrid.testing import relative_error

WIDE, EPSILON = torch.float64, 1e-6


def test_by_hand() -> None:
    x_BTD, branch_BTD, first_BTD = (
        torch.tensor([[row]], dtype=WIDE) for row in ([1.0, 2.0], [2.0, -4.0], [5.0, 1.0])
    )
    # s = (3, -2), u = (2 3 - 5, -(-2) + 3 1), whose mean square is 13.
    mix_2D = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=WIDE)
    u_BTD, z_BTD = mixed_norm(x_BTD, branch_BTD, first_BTD, mix_2D, 0.5, 0.0)
    assert u_BTD.flatten().tolist() == [1.0, 5.0]
    assert z_BTD.flatten().tolist() == pytest.approx([0.5 / math.sqrt(13), 2.5 / math.sqrt(13)])
    plain_BTD, _ = mixed_norm(x_BTD, branch_BTD, None, None, 1.0, EPSILON)
    assert plain_BTD.flatten().tolist() == [3.0, -2.0]
    assert torch.equal(mixed_norm(x_BTD, None, None, None, 1.0, EPSILON)[0], x_BTD)


def test_a_gate_by_hand() -> None:
    x_BTD, branch_BTD, gate_BTD = (
        torch.tensor([[row]], dtype=WIDE) for row in ([1.0, 2.0], [4.0, 8.0], [0.0, -math.log(3)])
    )
    u_BTD, z_BTD = mixed_norm(x_BTD, branch_BTD, None, None, 1.0, 0.0, gate_BTD)
    # Gates of a half and a quarter.
    assert u_BTD.flatten().tolist() == pytest.approx([3.0, 4.0])
    assert z_BTD.flatten().tolist() == pytest.approx([3 / math.sqrt(12.5), 4 / math.sqrt(12.5)])


def test_blends_by_hand() -> None:
    """Normed rows of one channel are signs, so that the blends can be read off."""
    x_BTD = torch.tensor([[2.0, -3.0, 4.0, 5.0], [-1.0, -6.0, 7.0, 7.0]], dtype=WIDE)[:, :, None]
    # The first row continues a document from position 6 on, of which nothing is known; another begins at its third
    # token. The second begins in its second token.
    positions_BT = torch.tensor([[6, 7, 0, 1], [3, 0, 1, 2]])
    share_r_D, share_k_D = torch.tensor([0.75]), torch.tensor([0.5], dtype=WIDE)
    u_BTD, r_BTD, k_BTD = mixed_blend(x_BTD, None, None, None, positions_BT, share_r_D, share_k_D, 1.0, 0.0)
    assert torch.equal(u_BTD, x_BTD)
    assert r_BTD[..., 0].tolist() == [[0.75, -0.5, 0.75, 1.0], [-0.75, -0.75, 0.5, 1.0]]
    assert k_BTD[..., 0].tolist() == [[0.5, 0.0, 0.5, 1.0], [-0.5, -0.5, 0.0, 1.0]]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 0.25]),
)
def test_operators_one_after_another(
    lengths: list[int], start: int, width: int, branched: bool, mixed: bool, scale: float
) -> None:
    generator = torch.Generator().manual_seed(len(lengths) + 10 * width)
    length = sum(lengths)
    x_BTD, branch_BTD, first_BTD = torch.randn(3, 2, length, width, dtype=WIDE, generator=generator)
    mix_2D = torch.randn(2, width, dtype=WIDE, generator=generator)
    share_r_D, share_k_D = torch.rand(2, width, dtype=WIDE, generator=generator)
    positions_BT = torch.cat([torch.arange(part) for part in lengths]).repeat(2, 1)
    positions_BT[1, : lengths[0]] += start
    branch, mix = branch_BTD if branched else None, mix_2D if mixed else None
    u_BTD, r_BTD, k_BTD = mixed_blend(
        x_BTD, branch, first_BTD, mix, positions_BT, share_r_D, share_k_D, scale, EPSILON
    )
    normed = mixed_norm(x_BTD, branch, first_BTD, mix, scale, EPSILON)
    expected_BTD = x_BTD + branch_BTD if branched else x_BTD
    if mixed:
        expected_BTD = mix_2D[0] * expected_BTD + mix_2D[1] * first_BTD
    z_BTD = scale * expected_BTD / torch.sqrt((expected_BTD**2).mean(-1, keepdim=True) + EPSILON)
    assert relative_error(u_BTD, expected_BTD) < 1e-10
    assert torch.equal(normed[0], u_BTD)
    assert relative_error(normed[1], z_BTD) < 1e-10
    for b in range(2):
        for t in range(length):
            before_D = z_BTD[b, t - 1] if t > 0 and positions_BT[b, t] > 0 else torch.zeros(width, dtype=WIDE)
            for blend_BTD, share_D in ((r_BTD, share_r_D), (k_BTD, share_k_D)):
                wanted_D = share_D * z_BTD[b, t] + (1 - share_D) * before_D
                assert relative_error(blend_BTD[b, t], wanted_D) < 1e-10


def test_the_dtype_is_the_streams() -> None:
    x_BTD, first_BTD = torch.randn(2, 1, 3, 4, dtype=torch.bfloat16)
    mix_2D, share_D = torch.ones(2, 4), torch.full((4,), 0.5)
    outputs = mixed_blend(
        x_BTD, x_BTD, first_BTD, mix_2D, torch.arange(3)[None], share_D, share_D, 0.5, EPSILON
    )
    assert [output.dtype for output in outputs] == [torch.bfloat16] * 3
    assert scaled_norm(x_BTD, 0.5, EPSILON).dtype == torch.bfloat16


def test_a_cpu_is_not_for_the_kernels() -> None:
    assert not fusable(torch.zeros(1, 2, 512, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 512])
def test_a_gated_branch_on_a_gpu(width: int) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(3, 40, width, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert fusable(leaves[0])
    x_BTD, branch_BTD, gate_BTD = leaves
    ours = mixed_norm(x_BTD, branch_BTD, None, None, 0.3, EPSILON, gate_BTD)
    theirs = mixed_norm_reference(wide[0], wide[1], None, None, 0.3, EPSILON, wide[2])
    gradients = [torch.randn_like(output) for output in ours]
    own = torch.autograd.grad(ours, leaves, gradients)
    reference = torch.autograd.grad(theirs, wide, [gradient.double() for gradient in gradients])
    for output, expected in zip((*ours, *own), (*theirs, *reference), strict=True):
        assert relative_error(output, expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("blended", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("branched", [False, True])
def test_kernels_are_the_definition_in_outputs_and_gradients(
    branched: bool, mixed: bool, blended: bool, width: int
) -> None:
    torch.manual_seed(0)
    length, scale = 40, 0.3
    x_BTD, branch_BTD, first_BTD = torch.randn(3, 3, length, width, device="cuda").bfloat16()
    mix_2D = torch.randn(2, width, device="cuda")
    share_r_D, share_k_D = torch.rand(2, width, device="cuda")
    positions_BT = torch.arange(length, device="cuda").repeat(3, 1)
    positions_BT[0, 7:] -= 7
    positions_BT[0, -1] = 0
    positions_BT[1, :20] += 5  # a continued block: its first token is not its document's
    positions_BT[1, 20:] -= 20
    leaves = [x_BTD, *([branch_BTD] if branched else []), *([first_BTD, mix_2D] if mixed else [])]
    leaves += [share_r_D, share_k_D] if blended else []
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert fusable(leaves[0])

    def apply(tensors: list[Tensor], reference: bool) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        x_BTD, branch_BTD = next(rest), next(rest) if branched else None
        stream = (x_BTD, branch_BTD, *((next(rest), next(rest)) if mixed else (None, None)))
        if blended:
            blend = mixed_blend_reference if reference else mixed_blend
            return blend(*stream, positions_BT, next(rest), next(rest), scale, EPSILON)
        norm = mixed_norm_reference if reference else mixed_norm
        return norm(*stream, scale, EPSILON)

    ours, theirs = apply(leaves, reference=False), apply(wide, reference=True)
    for output, expected in zip(ours, theirs, strict=True):
        assert output.dtype == torch.bfloat16
        assert relative_error(output, expected) < 1e-2
    gradients = [torch.randn_like(output) for output in ours]
    wide_gradients = [gradient.double() for gradient in gradients]
    own = torch.autograd.grad(ours, leaves, gradients, retain_graph=True)
    reference = torch.autograd.grad(theirs, wide, wide_gradients, retain_graph=True)
    for gradient, expected in zip(own, reference, strict=True):
        assert relative_error(gradient, expected) < 1e-2
    # Of the last output alone: the gradients of the others are absent.
    own = torch.autograd.grad(ours[-1], leaves, gradients[-1])
    reference = torch.autograd.grad(theirs[-1], wide, wide_gradients[-1], allow_unused=True)
    for gradient, expected in zip(own, reference, strict=True):
        assert relative_error(gradient, torch.zeros_like(gradient) if expected is None else expected) < 1e-2
