"""The measure by which tensors count as equal."""

import math

import pytest
import torch

from trihybrid.testing import relative_error


def test_error_is_relative_to_the_norm_of_the_reference():
    reference = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_error(reference, reference) == 0
    assert relative_error(reference + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), reference) == pytest.approx(0.1)
    assert relative_error(100 * reference, 100 * reference.double() + 1) == pytest.approx(2 / 501.4, rel=1e-2)


def test_a_reference_near_zero_counts_as_rms_1e_6():
    assert relative_error(torch.full((100,), 1e-7), torch.zeros(100)) == pytest.approx(0.1)


def test_nan_is_never_equal_and_empty_always():
    assert math.isnan(relative_error(torch.tensor([float("nan")]), torch.ones(1)))
    assert math.isnan(relative_error(torch.ones(1), torch.tensor([float("nan")])))
    assert relative_error(torch.zeros(2, 0), torch.zeros(2, 0)) == 0


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match=r"shape \(2,\), the reference \(1, 2\)"):
        relative_error(torch.ones(2), torch.ones(1, 2))
