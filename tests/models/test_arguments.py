"""The span of a forward pass, from transformers' mask, position ids and cache."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trihybrid.mixers.span import Span, from_lengths
from trihybrid.models.arguments import build_span, refuse_media

CPU = torch.device("cpu")


def span_of(
    batch: int, length: int, start: int = 0, mask: Any = None, position_ids: Tensor | None = None
) -> Span:
    return build_span(batch, length, start, mask, position_ids, CPU)


def test_nothing_given_is_one_document() -> None:
    span = span_of(2, 5, start=3)
    assert span.positions_BT.tolist() == [[3, 4, 5, 6, 7]] * 2
    assert (span.start, span.valid_BT, span.reset_BT) == (3, None, None)


def test_a_mask_of_ones_is_no_mask() -> None:
    span = span_of(2, 4, start=2, mask=torch.ones(2, 6))
    assert span.positions_BT.tolist() == [[2, 3, 4, 5]] * 2
    assert span.valid_BT is None


@given(
    pads=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    start=st.integers(0, 3),
    side=st.sampled_from("lr"),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_padding_on_one_side(pads: list[int], start: int, side: str) -> None:
    """Positions count real tokens, and exactly the padding of the new block is marked."""
    total = 9
    index_S = torch.arange(total)
    pad_B1 = torch.tensor(pads)[:, None]
    mask_BS = index_S >= pad_B1 if side == "l" else index_S < total - pad_B1
    span = span_of(len(pads), total - start, start, mask_BS.long())
    real_BT = mask_BS[:, start:]
    valid_BT = torch.ones_like(real_BT) if span.valid_BT is None else span.valid_BT
    assert torch.equal(valid_BT, real_BT)
    shift_B1 = pad_B1 if side == "l" else 0 * pad_B1
    expected_BT = (index_S[start:] - shift_B1).expand(len(pads), -1)
    assert torch.equal(span.positions_BT[real_BT], expected_BT[real_BT])
    assert span.reset_BT is None


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_restarting_positions_are_packed_documents(lengths: list[int]) -> None:
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    span, expected = span_of(1, sum(lengths), position_ids=position_ids), from_lengths(lengths)
    assert torch.equal(span.positions_BT, expected.positions_BT)
    assert span.borders == expected.borders == (len(lengths) > 1)
    if span.borders:
        assert int(span.reset_BT.sum()) == len(lengths)  # type: ignore[union-attr]


def test_one_row_of_positions_serves_the_batch() -> None:
    span = span_of(3, 4, position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert span.positions_BT.tolist() == [[0, 1, 0, 1]] * 3
    assert span.reset_BT.tolist() == [[True, False, True, False]] * 3  # type: ignore[union-attr]


def test_shifted_positions_are_one_document() -> None:
    span = span_of(1, 3, position_ids=torch.tensor([[5, 6, 7]]))
    assert span.positions_BT.tolist() == [[0, 1, 2]]
    assert span.reset_BT is None


def test_generate_positions_of_left_padding_are_not_packing() -> None:
    """generate gives padded tokens position 0, or 1, and real ones their count."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for filler in (0, 1):
        position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
        span = span_of(2, 5, mask=mask, position_ids=position_ids)
        assert span.valid_BT.tolist() == mask.bool().tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, 4, 4), r"is \(1, 1, 4, 4\); a recurrence needs the 2-D mask"),
        ({"full_attention": None}, "is dict; a recurrence needs the 2-D mask"),
        (torch.ones(1, 5), r"has shape \(1, 5\); expected \[batch, 4\]"),
        (torch.tensor([[1, 1, 0, 1]]), "padding between real tokens"),
        (torch.tensor([[0, 1, 1, 0]]), "padding between real tokens"),
    ],
)
def test_masks_that_are_refused(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        span_of(1, 4, mask=mask)


@pytest.mark.parametrize("mask", [torch.ones(1, 4), torch.tensor([[0, 1, 1, 1]])])
def test_a_mask_with_packing_is_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        span_of(1, 4, mask=mask, position_ids=torch.tensor([[0, 1, 0, 1]]))


@pytest.mark.parametrize("position_ids", [[[3, 0, 1, 2]], [[0, 1, 2, 3]], [[0, 1, 0, 1]]])
def test_packing_behind_a_cache_is_refused(position_ids: list[list[int]]) -> None:
    """Also when the new document begins with the first token of the block."""
    with pytest.raises(ValueError, match="the cache already holds 3 tokens"):
        span_of(1, 4, start=3, position_ids=torch.tensor(position_ids))


def test_positions_that_jump_are_refused() -> None:
    with pytest.raises(ValueError, match="must count up by 1 and restart at 0"):
        span_of(1, 4, position_ids=torch.tensor([[0, 1, 5, 6]]))


def test_tokens_for_media_are_refused_in_a_prompt() -> None:
    media = {7: "image_token_id", 9: "audio_token_id"}
    refuse_media(torch.tensor([[1, 2], [3, 4]]), media)
    refuse_media(torch.tensor([[7, 9]]), {})
    # A single new token is the model's own word.
    refuse_media(torch.tensor([[7], [9]]), media)
    with pytest.raises(
        ValueError, match="input_ids hold 9, the audio_token_id: this is the text model alone"
    ):
        refuse_media(torch.tensor([[1, 2], [9, 4]]), media)
