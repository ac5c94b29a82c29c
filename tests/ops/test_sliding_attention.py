"""Sliding-window attention in blocks against its definition."""

import pytest
import torch
from torch import Tensor

from trihybrid.ops.sliding_attention import Documents, sliding_attention
from trihybrid.ops.sliding_attention.blocked import blocked
from trihybrid.ops.sliding_attention.dense import dense
from trihybrid.ops.sliding_attention.flash import no_flash
from trihybrid.testing import relative_error
from trihybrid.testing.live import live_tensors

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def make(
    batch: int, length: int, heads: int, groups: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, count, width, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for count in (heads, groups, groups)
    ]


def documents_of(*rows: list[int]) -> Documents:
    positions = [torch.cat([torch.arange(n) for n in row]) for row in rows]
    return Documents(torch.stack(positions), any(len(row) > 1 for row in rows))


def by_formula(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int, scale: float) -> Tensor:
    """Token by token, in float64."""
    outputs = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(q.shape[0]):
        for t in range(q.shape[1]):
            back = min(int(documents.positions_BT[row, t]), window - 1)
            for head in range(q.shape[2]):
                group = head // (q.shape[2] // k.shape[2])
                keys, values = (x[row, t - back : t + 1, group].double() for x in (k, v))
                outputs[row, t, head] = torch.softmax(scale * keys @ q[row, t, head].double(), 0) @ values
    return outputs


@pytest.mark.parametrize(
    ("rows", "window"),
    [([[20], [20]], 3), ([[20], [20]], 20), ([[9, 11], [3, 17]], 5), ([[1, 1, 18], [20, 0]], 1)],
)
def test_the_definition_is_the_formula(rows, window) -> None:
    documents = documents_of(*rows)
    q, k, v = make(2, 20, 4, 2, 6, torch.float64)
    expected = by_formula(q.detach(), k.detach(), v.detach(), documents, window, 0.7)
    assert relative_error(dense(q, k, v, documents, window, 0.7), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("rows", "window", "heads", "groups"),
    [
        ([[64], [64]], 16, 4, 1),
        ([[70], [70]], 16, 4, 2),
        ([[71], [71]], 17, 2, 2),
        ([[30, 41], [7, 64]], 9, 4, 1),
        ([[1, 2, 68], [40, 31]], 32, 3, 3),
        ([[71], [60, 11]], 2, 2, 1),
    ],
)
def test_blocks_are_the_definition(rows, window, heads, groups, dtype) -> None:
    """Outputs and every gradient, with documents that begin inside of blocks and rows that do not fill the last."""
    documents = documents_of(*rows)
    length = documents.positions_BT.shape[1]
    inputs = make(2, length, heads, groups, 8, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found = blocked(*inputs, documents, window, 0.5, shortest=16)
    expected = dense(*wide, documents, window, 0.5)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert found.dtype == dtype
    assert relative_error(found, expected) <= TOLERANCE[dtype]
    gradients = zip(
        torch.autograd.grad(found, inputs, slope.to(dtype)),
        torch.autograd.grad(expected, wide, slope),
        strict=True,
    )
    assert all(relative_error(one, other) <= TOLERANCE[dtype] for one, other in gradients)


def test_a_block_that_begins_inside_of_a_document_sees_what_is_there() -> None:
    """Positions larger than the place in the row, as in the later part of a document that was cut."""
    inputs = make(1, 40, 2, 1, 8, torch.float64)
    cut = Documents(torch.arange(40)[None] + 100, borders=False)
    whole = Documents(torch.arange(40)[None], borders=False)
    for function in (dense, blocked):
        options = {"shortest": 16} if function is blocked else {}
        found, expected = (function(*inputs, d, 12, 1.0, **options) for d in (cut, whole))
        assert torch.equal(found, expected)


def test_packing() -> None:
    starts, longest = documents_of([3, 5], [8]).packing
    assert starts.tolist() == [0, 3, 8, 16] and starts.dtype == torch.int32 and longest == 8
    starts, longest = documents_of([8], [8]).packing
    assert starts.tolist() == [0, 8, 16] and longest == 8
    # A row that goes on with a document begins one all the same.
    starts, longest = Documents(torch.tensor([[4, 5, 0, 1], [0, 1, 2, 3]]), True).packing
    assert starts.tolist() == [0, 2, 4, 8] and longest == 4


def test_memory_is_linear_in_the_length() -> None:
    """Forward and backward, counted: twice the tokens take twice the bytes, where the definition takes four times."""

    def peak(function, length: int) -> int:
        inputs = make(1, length, 2, 1, 8, torch.float32)
        documents = Documents(torch.arange(length)[None], borders=False)
        with live_tensors() as live:
            function(*inputs, documents, 64, 1.0).sum().backward()
        return live.peak

    lengths = (512, 1024)
    short, long = (peak(blocked, n) for n in lengths)
    assert 1.9 <= long / short <= 2.1
    short, long = (peak(dense, n) for n in lengths)
    assert long / short >= 3


def test_the_choice_of_a_backend() -> None:
    inputs = make(1, 8, 2, 1, 8, torch.float64)
    documents = documents_of([8])
    assert torch.equal(
        sliding_attention(*inputs, documents, 3, 1.0),
        sliding_attention(*inputs, documents, 3, 1.0, "blocked"),
    )
    with pytest.raises(
        ValueError, match="'flash' of operator 'sliding_attention' is not available on cpu: needs a"
    ):
        sliding_attention(*inputs, documents, 3, 1.0, "flash")
    with pytest.raises(ValueError, match="has no backend 'fast'"):
        sliding_attention(*inputs, documents, 3, 1.0, "fast")


def test_bad_input() -> None:
    q, k, v = make(1, 8, 4, 2, 8, torch.float64)
    documents = documents_of([8])
    with pytest.raises(ValueError, match=r"keys \[1, 7, 2, 8\].*must be \[B, T, G, D\] of the same tokens"):
        sliding_attention(q, k[:, :7], v, documents, 3, 1.0)
    with pytest.raises(ValueError, match="with G a divisor of H"):
        sliding_attention(q[:, :, :3], k, v, documents, 3, 1.0)
    with pytest.raises(
        ValueError, match=r"positions are \[1, 9\], one is needed for each of the \[1, 8\] tokens"
    ):
        sliding_attention(q, k, v, documents_of([9]), 3, 1.0)
    with pytest.raises(ValueError, match="window is 0; a query reads itself at least"):
        sliding_attention(q, k, v, documents, 0, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["blocked", "flash"])
@pytest.mark.parametrize(("rows", "window"), [([[1000], [1000]], 512), ([[300, 700], [1, 999]], 100)])
def test_half_precision_on_a_gpu(rows, window, backend) -> None:
    if backend == "flash" and no_flash(torch.device("cuda")):
        pytest.skip(str(no_flash(torch.device("cuda"))))
    documents = documents_of(*rows)
    documents = Documents(documents.positions_BT.cuda(), documents.borders)
    inputs = make(2, 1000, 8, 1, 256, torch.bfloat16, "cuda")
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found = sliding_attention(*inputs, documents, window, 1 / 16, backend)
    expected = dense(*wide, documents, window, 1 / 16)
    slope = torch.randn_like(found)
    assert relative_error(found, expected) <= 2e-2
    gradients = zip(
        torch.autograd.grad(found, inputs, slope),
        torch.autograd.grad(expected, wide, slope.double()),
        strict=True,
    )
    assert all(relative_error(one, other) <= 2e-2 for one, other in gradients)
