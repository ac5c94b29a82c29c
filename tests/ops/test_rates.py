"""Decay and in-context learning rate: their range, their numbers, and their kernel."""

import math

import pytest
import torch

from trihybrid.ops.rates import DECAY_FLOOR, rates, rates_reference
from trihybrid.testing import relative_error


def test_numbers():
    offsets = torch.tensor([0.0, 40.0, -40.0], dtype=torch.float64)
    zero = torch.zeros(1, 1, 3, dtype=torch.float64)
    log_w, a = rates(zero, zero, offsets, offsets)
    floor = -math.exp(-0.5)
    assert log_w.flatten().tolist() == pytest.approx([floor / 2, floor, 0.0], abs=1e-12)
    assert a.flatten().tolist() == pytest.approx([0.5, 1.0, 0.0], abs=1e-12)
    assert floor == DECAY_FLOOR


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_wide_from_the_products_on(dtype):
    """A W that is nearer to one than the products' dtype can tell keeps its distance."""
    low = torch.full((1, 1, 1), -9.0, dtype=dtype)
    log_w, _ = rates(low, low, torch.full((1,), -0.01), torch.zeros(1))
    assert log_w.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(log_w) == pytest.approx(DECAY_FLOOR / (1 + math.exp(9.01)), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (2, 7, 48)])
def test_kernel(shape):
    decay, iclr = (4 * torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    offsets = [torch.randn(shape[-1], device="cuda") for _ in range(2)]
    with torch.no_grad():
        found = rates(decay, iclr, *offsets)
    expected = rates_reference(decay.double(), iclr.double(), *offsets)
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(found, expected, strict=True))
    assert all(x.dtype == torch.float32 for x in found)
