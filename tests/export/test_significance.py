"""One-sided t-tests, against tabulated values."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.export.significance import compare_means, student_below


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [
        (-6.313752, 1, 0.05),  # tables of Student's distribution
        (-2.919986, 2, 0.05),
        (-9.924843, 2, 0.005),
        (-2.015048, 5, 0.05),
        (-1.697261, 30, 0.05),
        (0.0, 3.5, 0.5),
    ],
)
def test_students_distribution_matches_its_tables(t: float, degrees: float, p: float) -> None:
    assert student_below(t, degrees) == pytest.approx(p, rel=1e-5)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.floats(0.0, 50.0), st.floats(1.0, 200.0))
def test_both_tails_add_up_to_one(t: float, degrees: float) -> None:
    assert student_below(t, degrees) + student_below(-t, degrees) == pytest.approx(1.0, abs=1e-9)


def test_welch_matches_a_sum_done_by_hand() -> None:
    equal = compare_means([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert (equal.difference, equal.degrees) == (-3.0, pytest.approx(4.0))
    assert equal.t == pytest.approx(-3.0 / (2.0 / 3.0) ** 0.5) and equal.p == pytest.approx(
        0.010656, abs=1e-6
    )
    unequal = compare_means([1.0, 2.0, 3.0], [4.0, 4.5])
    assert unequal.degrees == pytest.approx((1 / 3 + 1 / 16) ** 2 / ((1 / 3) ** 2 / 2 + (1 / 16) ** 2))


def test_one_number_is_a_test_of_one_sample() -> None:
    found = compare_means([1.0, 2.0, 3.0], [4.0])
    assert found.t == pytest.approx(-2.0 * 3**0.5) and found.degrees == 2.0
    assert found.p == pytest.approx(0.03709, abs=1e-5)


@pytest.mark.parametrize(("values", "baseline"), [([1.0], [1.0]), ([1.0, 2.0], []), ([1.0, 1.0], [2.0])])
def test_what_cannot_be_compared_is_refused(values: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError, match="p-value"):
        compare_means(values, baseline)
