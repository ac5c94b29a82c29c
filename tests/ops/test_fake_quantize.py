"""Fake quantisation: the formula, scales that float16 can hold, a straight-through gradient, a switch for compilers.

Legend: R rows, C columns.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from trihybrid.ops.fake_quantize import fake_quantize, integer_range, row_scales, storable_scales


def matrix(
    rows: int, columns: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)


def test_integer_ranges_are_those_of_twos_complement() -> None:
    assert [integer_range(bits) for bits in (2, 5, 6, 8)] == [(-2, 1), (-16, 15), (-32, 31), (-128, 127)]


def test_scales_by_hand() -> None:
    weight = torch.tensor([[31.0, -62.0], [3.0, -4.0], [0.0, 0.0]])
    assert row_scales(weight, 6, None).tolist() == pytest.approx([2.0, 4 / 31, 1.0])
    # rms of (3, -4) is sqrt(12.5)
    assert row_scales(weight, 6, 12.85)[1].item() == pytest.approx(12.85 * 12.5**0.5 / 31)


def test_integers_by_hand() -> None:
    # Scale 0.5: 0.75 and 1.25 lie between two integers and go to the even one, 20 and -20 out of range.
    weight = torch.tensor([[15.5, 0.75, 1.25, -0.3, 0.2]])
    expected = torch.tensor([[15.5, 1.0, 1.0, -0.5, 0.0]])
    assert torch.equal(fake_quantize(weight, 6, None, None), expected)


def test_a_small_clip_saturates_at_both_ends_of_the_range() -> None:
    weight = torch.tensor([[8.0, -8.0, 1.0, -1.0]])
    scale = storable_scales(row_scales(weight, 6, 1.0)).item()
    assert fake_quantize(weight, 6, 1.0, None)[0, :2].tolist() == pytest.approx([31 * scale, -32 * scale])


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    bits=st.integers(2, 8),
    exponent=st.integers(-44, 13),
    seed=st.integers(0, 99),
)
def test_no_weight_moves_more_than_half_a_step(
    rows: int, columns: int, bits: int, exponent: int, seed: int
) -> None:
    weight = matrix(rows, columns, seed, 2.0**exponent)
    scale_R = storable_scales(row_scales(weight, bits, None))
    assert torch.equal(scale_R.half().float(), scale_R)
    assert (scale_R > 0).all()
    moved = (fake_quantize(weight, bits, None, None) - weight).abs()
    assert (moved <= 0.5001 * scale_R[:, None]).all()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.floats(2.0**-120, 65504.0, width=32))
def test_storable_scales_are_the_next_float16_above(value: float) -> None:
    scale = torch.tensor([value])
    stored = storable_scales(scale)
    assert torch.equal(stored.half().float(), stored)
    below = torch.nextafter(stored.half(), torch.zeros(1, dtype=torch.float16)).float()
    assert below < scale <= stored


def test_bits_after_entropy_coding_follow_the_clip() -> None:
    """A Gaussian row at k root mean squares costs log2(sqrt(2 pi e) 31 / k) bits a weight; doubling k saves one."""
    weight = matrix(64, 4096)
    for clip, expected in ((4.0, 5.0), (8.0, 4.0), (12.85, 3.316)):
        scale_R = row_scales(weight, 6, clip)
        counts = torch.bincount((weight / scale_R[:, None]).round().clamp(-32, 31).long().flatten() + 32)
        share = counts[counts > 0] / weight.numel()
        assert -(share * share.log2()).sum().item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0])
def test_the_gradient_is_that_of_the_weight(dtype: torch.dtype, amount: float) -> None:
    weight = matrix(6, 10, dtype=dtype).requires_grad_()
    upstream = matrix(6, 10, seed=1, dtype=dtype)
    fake_quantize(weight, 5, None, torch.tensor(amount)).backward(upstream)
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_switched_off_it_is_the_weight_to_the_bit(dtype: torch.dtype) -> None:
    weight = matrix(6, 10, dtype=dtype)
    out = fake_quantize(weight, 6, 12.85, torch.tensor(0.0))
    assert out.dtype == dtype
    assert torch.equal(out, weight)


def test_a_wider_weight_gives_the_same_integers() -> None:
    weight = matrix(6, 10)
    wide = fake_quantize(weight.double(), 6, None, None)
    assert torch.equal(wide.float(), fake_quantize(weight, 6, None, None))


def test_the_switch_acts_inside_a_compiled_graph_without_another_compilation() -> None:
    weight = matrix(8, 12).requires_grad_()
    inputs = matrix(3, 12, seed=1)
    active = torch.tensor(0.0)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss(weight: Tensor, active: Tensor) -> Tensor:
        return (inputs @ fake_quantize(weight, 6, 6.0, active).T).square().sum()

    plain = loss(weight, active).item()
    active.fill_(1.0)
    quantised = loss(weight, active)
    (gradient,) = torch.autograd.grad(quantised, weight)
    assert counter.frame_count == 1
    assert plain == pytest.approx((inputs @ weight.T).square().sum().item(), rel=1e-6)
    value = fake_quantize(weight.detach(), 6, 6.0, None)
    expected = (inputs @ value.T).square().sum().item()
    assert quantised.item() == pytest.approx(expected, rel=1e-6)
    assert abs(expected - plain) > 1e-3 * plain
    torch.testing.assert_close(gradient, 2 * (inputs @ value.T).T @ inputs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(2, 2), 9, None, None), "bits is 9"),
        ((torch.ones(2, 2), 1, None, None), "bits is 1"),
        ((torch.ones(2, 2), 6, 0.0, None), "clip is 0.0"),
        ((torch.ones(2, 2), 6, float("inf"), None), "clip is inf"),
        ((torch.ones(2), 6, None, None), r"torch.float32 \[2\]"),
        ((torch.ones(2, 2, dtype=torch.int8), 6, None, None), "torch.int8"),
        ((torch.ones(2, 2), 6, None, torch.tensor(1)), "active is torch.int64"),
        ((torch.ones(2, 2), 6, None, torch.ones(1)), r"active is torch.float32 \[1\]"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fake_quantize(*arguments)
