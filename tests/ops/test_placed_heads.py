"""Heads behind norm and rotation: the engine's own form of it, and the kernel."""

import pytest
import torch

from trihybrid.infer.network.parts import placed
from trihybrid.ops.placed_heads import placed_heads, placed_heads_reference
from trihybrid.testing import relative_error


def make(shape, device="cpu", dtype=torch.float64):
    """Heads that are a part of wider rows, a weight, and a table."""
    batch, length, heads, width = shape
    rows = torch.randn(batch, length, (heads + 1) * width, device=device, dtype=dtype)
    angle = torch.randn(batch, length, 1, width // 2, device=device)
    table = angle.cos().repeat(1, 1, 1, 2), torch.cat([-angle.sin(), angle.sin()], -1)
    x = rows[..., width:].unflatten(-1, (heads, width))
    return x, torch.rand(width, device=device, dtype=dtype) + 0.5, tuple(part.to(dtype) for part in table)


def test_is_what_the_engine_does_in_parts():
    x, weight, table = make((2, 5, 3, 8))
    assert relative_error(placed_heads(x, weight, 1e-6, *table), placed(x, weight, 1e-6, table)) < 1e-14


def test_a_rotation_keeps_lengths():
    x, weight, table = make((1, 9, 2, 16))
    lengths = placed_heads(x, torch.ones_like(weight), 0.0, *table).norm(dim=-1)
    assert torch.allclose(lengths, torch.full_like(lengths, 4.0), atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 4096, 8, 256), (1, 33, 1, 512), (2, 5, 4, 64)])
def test_kernel(shape):
    x, weight, table = make(shape, "cuda", torch.bfloat16)
    wide = [tensor.double() for tensor in (x, weight, *table)]
    found = placed_heads(x, weight, 1e-6, *table)
    assert relative_error(found, placed_heads_reference(wide[0], wide[1], 1e-6, *wide[2:])) < 2.5e-3
    assert found.is_contiguous()
