"""The token shift against a loop over tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trihybrid.ops.token_shift import last_tokens, token_shift


def by_hand(documents: list[Tensor], back: int) -> Tensor:
    """x[t - back] inside each document [T, D], zero where it has no such token; one row [T, D]."""
    rows = [
        document[t - back] if t >= back else torch.zeros_like(document[0])
        for document in documents
        for t in range(len(document))
    ]
    return torch.stack(rows)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 2),
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
)
def test_shift_of_packed_documents_in_blocks(
    lengths: list[int], back: int, more: int, sizes: list[int]
) -> None:
    documents = [torch.randn(length, 3, dtype=torch.float64) for length in lengths]
    positions_BT = torch.cat([torch.arange(length) for length in lengths])[None]
    row_BTD, expected = torch.cat(documents)[None], by_hand(documents, back)
    assert torch.equal(token_shift(row_BTD, None, positions_BT, back)[0], expected)
    # In blocks, from a store that may hold more tokens than this shift needs.
    before, start, parts = None, 0, []
    while start < row_BTD.shape[1]:
        stop = start + sizes[len(parts) % len(sizes)]
        block = row_BTD[:, start:stop]
        parts.append(token_shift(block, before, positions_BT[:, start:stop], back))
        before, start = last_tokens(block, before, back + more), stop
    assert torch.equal(torch.cat(parts, 1)[0], expected)
    assert before is not None
    padded = torch.cat([torch.zeros(1, back + more, 3, dtype=torch.float64), row_BTD], 1)
    assert torch.equal(before, padded[:, -(back + more) :])


def test_another_document_is_zero_whatever_it_holds_and_gets_no_gradient() -> None:
    x_BTD = torch.tensor([[[1.0], [float("inf")], [float("nan")], [3.0], [4.0]]], requires_grad=True)
    shifted = token_shift(x_BTD, None, torch.tensor([[0, 1, 2, 0, 1]]))
    assert shifted[0, 3:, 0].tolist() == [0.0, 3.0]
    (gradient,) = torch.autograd.grad(shifted[0, 3:].sum(), x_BTD)
    assert gradient[0, :, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]


def test_dtype_is_kept() -> None:
    x_BTD = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    positions_BT = torch.arange(3).expand(2, 3)
    assert token_shift(x_BTD, None, positions_BT).dtype == torch.bfloat16
    assert last_tokens(x_BTD, None, 5).shape == (2, 5, 4)
