"""Attention of one query over a store is softmax over the tokens that it has seen, whatever lies behind them."""

import pytest
import torch
from torch import Tensor

from interpreted import MARKS
from trihybrid.ops.decode_attention import decode_attention, paged_attention
from trihybrid.testing import relative_error

SIZES = [(3, 4, 2, 16, 5), (2, 8, 1, 32, 64), (1, 2, 2, 16, 7)]


def store(batch: int, heads: int, groups: int, width: int, length: int, pages: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    q_BHD = torch.randn(batch, heads, width, generator=generator)
    keys, values = (torch.randn(99, length, groups, width, generator=generator) for _ in range(2))
    table_BM = torch.randperm(99, generator=generator)[: batch * pages].view(batch, pages)
    lengths_B = torch.randint(1, pages * length + 1, (batch,), generator=generator)
    lengths_B[0] = 1
    return q_BHD, keys, values, table_BM, lengths_B


def definition(q_BHD: Tensor, keys: Tensor, values: Tensor, table_BM: Tensor, lengths_B: Tensor) -> Tensor:
    """Head by head, in float64, over the tokens alone."""
    o_BHD = torch.zeros(q_BHD.shape, dtype=torch.float64)
    repeats = q_BHD.shape[1] // keys.shape[2]
    for b, length in enumerate(lengths_B.tolist()):
        k_SGD, v_SGD = (part[table_BM[b]].flatten(0, 1)[:length].double() for part in (keys, values))
        for h in range(q_BHD.shape[1]):
            p_S = (0.3 * k_SGD[:, h // repeats] @ q_BHD[b, h].double()).softmax(0)
            o_BHD[b, h] = p_S @ v_SGD[:, h // repeats]
    return o_BHD


@pytest.mark.parametrize("sizes", SIZES)
def test_pages(sizes: tuple[int, ...]) -> None:
    arguments = store(*sizes, pages=6)
    assert relative_error(paged_attention(*arguments, 0.3), definition(*arguments)) < 1e-5


@pytest.mark.parametrize("sizes", SIZES)
def test_lines(sizes: tuple[int, ...]) -> None:
    q_BHD, keys, values, _, lengths_B = store(*sizes, pages=1)
    batch = len(q_BHD)
    found = decode_attention(q_BHD, keys[:batch], values[:batch], lengths_B, 0.3)
    wanted = definition(q_BHD, keys, values, torch.arange(batch)[:, None], lengths_B)
    assert relative_error(found, wanted) < 1e-5


class TestInterpreted:
    """The kernels, in Triton's interpreter."""

    pytestmark = MARKS

    @pytest.mark.parametrize("pages", [1, 6, 40])
    @pytest.mark.parametrize("sizes", SIZES)
    def test_pages(self, load, sizes, pages):
        room = load("trihybrid.ops.decode_attention")
        arguments = store(*sizes, pages=min(pages, 99 // sizes[0]))
        found = room.paged_attention(*arguments, 0.3)
        assert relative_error(found, definition(*arguments)) < 1e-5

    def test_lines(self, load):
        room = load("trihybrid.ops.decode_attention")
        q_BHD, keys, values, _, lengths_B = store(*SIZES[1], pages=1)
        found = room.decode_attention(q_BHD, keys[3:5], values[3:5], lengths_B, 0.3)
        wanted = definition(q_BHD, keys, values, torch.tensor([[3], [4]]), lengths_B)
        assert relative_error(found, wanted) < 1e-5
