"""Attention of a chunk is softmax over the tokens up to its end, whatever the blocks in which it is computed."""

import pytest
import torch
from torch import Tensor

from trihybrid.ops.chunk_attention import chunk_attention, window_blocks
from trihybrid.testing import relative_error


def make(length: int, total: int, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, heads, 16), (2, total, groups, 16), (2, total, groups, 16))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def definition(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, window: int | None) -> Tensor:
    length, total = q_BTHD.shape[1], k_BSGD.shape[1]
    repeats = q_BTHD.shape[2] // k_BSGD.shape[2]
    k, v = (x.double().repeat_interleave(repeats, 2) for x in (k_BSGD, v_BSGD))
    scores = 0.4 * torch.einsum("bthd,bshd->bhts", q_BTHD.double(), k)
    distance = torch.arange(total - length, total)[:, None] - torch.arange(total)
    hidden = (distance < 0) | (distance >= (window or total))
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("pairs", [1, 100, 2**21])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize(
    ("length", "total", "heads", "groups"), [(13, 13, 4, 2), (13, 30, 2, 2), (1, 9, 4, 1)]
)
def test_queries_in_blocks_of_any_size(
    length: int, total: int, heads: int, groups: int, window: int | None, pairs: int
) -> None:
    tensors = make(length, total, heads, groups)
    assert relative_error(chunk_attention(*tensors, window, 0.4, pairs), definition(*tensors, window)) < 1e-5


@pytest.mark.parametrize("window", [1, 5, 8])
@pytest.mark.parametrize(("length", "before"), [(16, 0), (17, 3), (24, 4), (9, 7), (40, 30)])
def test_blocks_of_a_window(length: int, before: int, window: int) -> None:
    tensors = make(length, length + before, 4, 2)
    assert relative_error(window_blocks(*tensors, window, 0.4), definition(*tensors, window)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("window", [1, 512, 700])
@pytest.mark.parametrize(("length", "before"), [(4096, 0), (4096, 511), (300, 511), (5, 600), (1, 511)])
def test_windows_by_flash(length: int, before: int, window: int, width: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for shape in (
            (1, length, 8, width),
            (1, length + before, 2, width),
            (1, length + before, 2, width),
        )
    )
    wide = [x.double().cpu() for x in (q, k, v)]
    found = chunk_attention(q, k, v, window, 0.05)
    assert relative_error(found.cpu(), chunk_attention(wide[0], wide[1], wide[2], window, 0.05)) < 5e-3
