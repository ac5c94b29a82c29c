"""Retained attention over rows in parts, with windows and without, is that over whole rows: in blocks of any size.

Legend: B batch, T time, H query heads, G key/value heads, N head width.
"""

import pytest
import torch
from torch import Tensor

from thread_workers import ThreadWorkers, by_threads
from trihybrid.mixers.span import packed, part_of_rows
from trihybrid.models.decoder.sliding import Earlier, window_of_span
from trihybrid.ops.attention import attention
from trihybrid.testing import relative_error

LENGTH = 192
BORDERS = {
    "one document": ((), ()),
    # At the border of two parts, in the window before the last of three, and right before and behind a border.
    "packed": ((96, 120), (5, 63, 65, 191)),
}


def positions_of(kind: str) -> Tensor:
    rows = []
    for begins in BORDERS[kind]:
        ends = [*begins, LENGTH]
        rows.append(
            torch.cat([torch.arange(end - start) for start, end in zip([0, *begins], ends, strict=True)])
        )
    return torch.stack(rows)


@pytest.mark.parametrize("kind", BORDERS)
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("window", [1, 2, 40, 70, 300, None])
def test_parts_are_the_whole(window: int | None, parts: int, kind: str) -> None:
    """A window of 70 is longer than a third, one of 300 than the row; 40 leaves several blocks of queries."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, LENGTH, heads, 8) for heads in (4, 2, 2, 4)]
    *tensors, weights_BTHN = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    positions_BT = positions_of(kind)
    whole = [x.clone().requires_grad_() for x in tensors]
    q_BTHN, k_BGTN, v_BGTN = whole[0], *(x.transpose(1, 2) for x in whole[1:])
    visible_BTS = packed(positions_BT).visible(LENGTH, window)
    expected_BTHN = attention(q_BTHN, k_BGTN, v_BGTN, visible_BTS, 0.3)
    (expected_BTHN * weights_BTHN).sum().backward()

    def work(workers: ThreadWorkers) -> list[Tensor]:
        part = workers.part()
        own = slice(part.index * LENGTH // parts, (part.index + 1) * LENGTH // parts)
        span = part_of_rows(positions_BT[:, own], part)
        mask = Earlier(span, part) if window is None else window_of_span(span, window)
        owned = [x[:, own].clone().requires_grad_() for x in tensors]
        o_BTHN = mask.attend(*owned, 0.3)
        (o_BTHN * weights_BTHN[:, own]).sum().backward()
        return [o_BTHN, *(x.grad for x in owned)]

    found = [torch.cat(pieces, 1) for pieces in zip(*by_threads(parts, work), strict=True)]
    for one, wanted in zip(found, [expected_BTHN, *(x.grad for x in whole)], strict=True):
        assert relative_error(one, wanted) <= 1e-10


def test_one_document_needs_no_table_of_its_earlier_parts() -> None:
    def work(workers: ThreadWorkers) -> list[bool]:
        part = workers.part()
        return [
            Earlier(part_of_rows(positions_of(kind)[:, 96 * part.index :][:, :96], part), part).visible_BTS
            is None
            for kind in BORDERS
        ]

    # The first part of the packed rows has a border too.
    assert by_threads(2, work) == [[True, False], [True, False]]
