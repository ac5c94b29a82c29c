"""Rotary positions against complex numbers, alone and behind the norm; the kernels against the definition, on a GPU."""

import cmath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.ops.rotary import (
    frequencies,
    fusable,
    normed_rotation,
    normed_rotation_reference,
    rotary_table,
    rotate,
)
from trihybrid.testing import relative_error

WIDE = torch.float64


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(0, 4), st.integers(0, 3), st.sampled_from([None, 64]), st.integers(0, 5000))
def test_a_pair_turns_by_its_angle(pairs: int, rest: int, spacing: int | None, position: int) -> None:
    dims, width = 2 * pairs, 2 * pairs + rest
    x_BTHN = torch.randn(1, 2, 3, width, dtype=WIDE)
    positions_BT = torch.tensor([[position, position + 7]])
    frequency_F = frequencies(dims, 1e4, spacing or dims, None, WIDE)
    turned = rotate(x_BTHN, *rotary_table(positions_BT, frequency_F))
    expected = x_BTHN.clone()
    for t, place in enumerate(positions_BT[0].tolist()):
        for h in range(3):
            for j in range(pairs):
                frequency = 1e4 ** (-2 * j / (spacing or dims))
                number = complex(x_BTHN[0, t, h, j], x_BTHN[0, t, h, j + pairs])
                number *= cmath.exp(-1j * place * frequency)
                expected[0, t, h, j], expected[0, t, h, j + pairs] = number.real, number.imag
    assert relative_error(turned, expected) < 1e-10


def test_scores_know_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=WIDE)
    frequency_F = frequencies(16, 1e4, 16, None, WIDE)

    def score(query: int, key: int) -> float:
        turned = [
            rotate(x, *rotary_table(torch.tensor([[p]]), frequency_F)) for x, p in ((q, query), (k, key))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(1005, 1000), abs=1e-9)
    assert abs(score(9, 4) - score(9, 3)) > 1e-3


def test_the_head_spacing_takes_the_highest_frequencies() -> None:
    head = frequencies(16, 1e4, 64, None, WIDE)
    assert torch.equal(head, frequencies(64, 1e4, 64, None, WIDE)[:8])
    assert head[-1] == pytest.approx(1e4 ** (-14 / 64))
    assert frequencies(16, 1e4, 16, None, WIDE)[-1] == pytest.approx(1e4 ** (-14 / 16))


def test_the_table_is_an_operator_that_a_compiler_can_shape() -> None:
    arguments = (torch.arange(6).reshape(2, 3), frequencies(8, 1e4, 8, None, torch.float32))
    torch.library.opcheck(rotary_table, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_head_is_normed_scaled_and_turned_by_hand() -> None:
    quarter = torch.zeros(1, 1, 1, 1, dtype=WIDE), torch.ones(1, 1, 1, 1, dtype=WIDE)
    x_BTHN = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 2.0, 2.0, 2.0]], dtype=WIDE).view(1, 1, 2, 4)
    # Mean squares 25 / 4 and 3; a quarter turn takes (x, y) to (y, -x).
    gain_H = torch.tensor([10.0, 3.0**0.5], dtype=WIDE)
    expected = torch.tensor([[16.0, -12.0, 0.0, 0.0], [2.0, 0.0, 2.0, 2.0]], dtype=WIDE).view(1, 1, 2, 4)
    torch.testing.assert_close(normed_rotation(x_BTHN, gain_H, *quarter, 0.0), expected)
    unit_H = normed_rotation(x_BTHN, None, *quarter, 0.0).square().mean(-1)
    torch.testing.assert_close(unit_H, torch.ones(1, 1, 2, dtype=WIDE))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_norm_gain_and_rotation_are_the_three_in_a_row(
    pairs: int, rest: int, heads: int, gained: bool
) -> None:
    torch.manual_seed(0)
    x_BTHN = torch.randn(2, 3, heads, 2 * pairs + rest, dtype=WIDE)
    gain_H = torch.rand(heads, dtype=WIDE) if gained else None
    table = rotary_table(torch.arange(6).reshape(2, 3), frequencies(2 * pairs, 1e4, 64, None, WIDE))
    normed = x_BTHN / (x_BTHN.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    scaled = normed if gain_H is None else normed * gain_H[:, None]
    assert relative_error(normed_rotation(x_BTHN, gain_H, *table, 1e-6), rotate(scaled, *table)) < 1e-10


def test_a_cpu_is_not_for_the_kernels() -> None:
    assert not fusable(torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16), 8)


@pytest.mark.gpu
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize(
    ("heads", "width", "pairs"), [(8, 64, 8), (4, 64, 32), (3, 128, 6), (6, 16, 0), (1, 256, 16)]
)
def test_the_kernels_are_the_definition(heads: int, width: int, pairs: int, gained: bool) -> None:
    torch.manual_seed(0)
    # Heads first in memory, so that the kernels' rows are not what the tensor's strides say.
    x_BTHN = torch.randn(2, heads, 333, width, device="cuda").bfloat16().transpose(1, 2).requires_grad_()
    gain_H = (torch.rand(heads, device="cuda") + 0.5).requires_grad_()
    positions_BT = torch.arange(666, device="cuda").reshape(2, 333)
    frequency_F = frequencies(2 * pairs, 1e4, width, positions_BT.device, torch.float32)
    table = [t.bfloat16() for t in rotary_table(positions_BT, frequency_F)]
    assert fusable(x_BTHN, pairs)
    leaves = [x_BTHN, gain_H] if gained else [x_BTHN]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = normed_rotation(x_BTHN, gain_H if gained else None, *table, 1e-6)
    reference = normed_rotation_reference(
        wide[0], wide[1] if gained else None, *(t.double() for t in table), 1e-6
    )
    grad = torch.randn_like(reference).bfloat16()
    assert out.dtype == torch.bfloat16
    assert relative_error(out, reference) < 1e-2
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(reference, wide, grad.double())
    for gradient, expected in zip(ours, theirs, strict=True):
        assert relative_error(gradient, expected) < 1e-2
