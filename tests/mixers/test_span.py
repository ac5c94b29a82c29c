"""`Span.visible` against the definition, token pair by token pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.mixers.span import contiguous, from_lengths, packed, padded

PADDING = -1


@st.composite
def blocks(draw):
    """A span and, for every row, the document of each token seen so far (PADDING for padding)."""
    total = draw(st.integers(1, 14))
    start = draw(st.integers(0, total - 1))
    rows = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["contiguous", "packed", "padded"]))
    if kind == "contiguous":
        return contiguous(rows, total - start, start), [[0] * total] * rows, start
    documents, positions = [], []
    for _ in range(rows):
        if kind == "packed":
            begins = [t == 0 or draw(st.booleans()) for t in range(total)]
            row = [sum(begins[: t + 1]) for t in range(total)]
            positions.append([t - row.index(row[t]) for t in range(total)])
        else:
            padding = draw(st.integers(0, total))
            row = [PADDING] * padding + [0] * (total - padding)
            if draw(st.booleans()):
                row.reverse()
        documents.append(row)
    if kind == "packed":
        return packed(torch.tensor(positions)[:, start:], start), documents, start
    mask_BS = torch.tensor(documents) != PADDING
    return padded(mask_BS, total - start, start), documents, start


@settings(deadline=None, max_examples=300, derandomize=True)
@given(blocks(), st.none() | st.integers(1, 16), st.booleans(), st.integers(0, 3))
def test_visible_is_its_definition(block, window, drop, spare):
    span, documents, start = block
    total = len(documents[0])
    # A sliding state has dropped what no query of the block can read; a preallocated one has spare keys at its end.
    first = max(0, start - window + 1) if window and drop else 0
    keys = total - first + (0 if first else spare)
    visible = span.visible(keys, window, first)
    if visible is None:
        assert span.length == 1 or keys == span.length
        visible = torch.ones(span.length, keys, dtype=torch.bool).tril(keys - span.length)[None]
    visible = visible.expand(len(documents), -1, -1)
    for row, document in enumerate(documents):
        for t in range(start, total):
            expected = [
                s <= t and s < total and document[s] == document[t] and (window is None or t - s < window)
                for s in range(first, first + keys)
                if s < total
            ] + [False] * (first + keys - total)
            if document[t] != PADDING:
                assert visible[row, t - start].tolist() == expected
            assert visible[row, t - start].any(), "even padding must see something, or its softmax is NaN"


@settings(deadline=None, max_examples=30, derandomize=True)
@given(blocks())
def test_reset_marks_exactly_the_first_tokens(block):
    span, documents, start = block
    expected = [
        [t == 0 or row[t] != row[t - 1] for t in range(start, len(row))] if span.borders else None
        for row in documents
    ]
    assert (span.reset_BT is None) == (not span.borders)
    if span.reset_BT is not None:
        assert span.reset_BT.tolist() == expected


def test_a_later_block_of_a_packed_row_does_not_see_earlier_documents():
    span = packed(torch.tensor([[2]]), start=5)
    assert span.visible(6).tolist() == [[[False, False, False, True, True, True]]]


def test_positions_and_padding():
    span = padded(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), 4)
    assert span.positions_BT.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert span.valid_BT.tolist() == [[False, False, True, True], [True] * 4]
    assert padded(torch.ones(2, 4), 1, 3).valid_BT is None
    assert from_lengths([2, 3]).positions_BT.tolist() == [[0, 1, 0, 1, 2]]
    assert contiguous(2, 2, 3).positions_BT.tolist() == [[3, 4], [3, 4]]


def test_plain_causal_blocks_need_no_mask():
    assert contiguous(2, 5).visible(5) is None
    assert contiguous(2, 1, 4).visible(5) is None
    assert contiguous(2, 1, 9).visible(3, window=3, first=7) is None
    assert contiguous(2, 5, 4).visible(9) is not None
    assert contiguous(2, 5).visible(5, window=4) is not None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: packed(torch.tensor([[0, 1, 3]])), "count up by 1"),
        (lambda: from_lengths([]), "at least 1"),
        (lambda: from_lengths([3, 0]), "at least 1"),
        (lambda: padded(torch.ones(2, 4), 3), r"expected \[batch, 3\]"),
        (lambda: padded(torch.tensor([[1, 0, 1]]), 3), "one side only"),
    ],
)
def test_errors_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()
