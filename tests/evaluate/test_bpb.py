"""Bits per byte of models with known probabilities."""

import itertools
import math

import pytest
import torch

from trihybrid.data import sequential
from trihybrid.evaluate import bits_per_byte, validation_piece


def test_uniform_model_needs_log2_of_the_vocabulary(uniform, batches) -> None:
    result = bits_per_byte(uniform, batches, decoded_bytes=9, raw_bytes=12)
    assert result.tokens == 18
    assert result.nats == pytest.approx(18 * math.log(260), rel=1e-6)
    assert result.decoded == pytest.approx(math.log2(260) * 18 / 9, rel=1e-6)
    assert result.raw == pytest.approx(math.log2(260) * 18 / 12, rel=1e-6)


def test_model_that_knows_the_next_token_needs_nothing(fake, batches) -> None:
    following = {}
    for batch in batches:
        for row in batch.tokens_BT.tolist():
            following |= {(now, place): after for place, (now, after) in enumerate(itertools.pairwise(row))}

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        table = torch.zeros(*ids.shape, 260)
        for row in range(ids.shape[0]):
            for time in range(ids.shape[1]):
                table[row, time, following[ids[row, time].item(), time]] = 60.0
        return table

    assert bits_per_byte(fake(logits), batches, 10, 10).decoded < 1e-6


def test_bytes_of_a_real_text_do_not_depend_on_the_windows(uniform, prepared) -> None:
    piece = validation_piece(prepared, None)
    tokens = len(prepared.validation) - len(prepared.validation_documents)
    text_bytes = sum(len(text.encode()) for text in prepared.validation_documents)
    assert (piece.decoded_bytes, piece.raw_bytes) == (text_bytes, text_bytes)
    for length in (5, 64, 10_000):
        result = bits_per_byte(
            uniform, sequential(prepared.validation, length, 3), piece.decoded_bytes, piece.raw_bytes
        )
        # One token a byte: each is predicted exactly once, in any window.
        assert result.tokens == tokens == text_bytes
        assert result.decoded == pytest.approx(math.log2(260), rel=1e-6)


@pytest.mark.parametrize("counts", [(0, 5), (5, 0)])
def test_no_bytes(uniform, batches, counts) -> None:
    with pytest.raises(ValueError, match="bytes is 0"):
        bits_per_byte(uniform, batches, *counts)
