"""Rotary positions against complex numbers."""

import cmath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.ops.rotary import frequencies, rotary_table, rotate
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
