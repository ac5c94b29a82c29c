"""Loss by restarting position."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from trihybrid.evaluate import loss_by_position, position_edges


@given(length=st.integers(1, 5000), buckets=st.integers(1, 20))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_edges_cover_and_double(length: int, buckets: int) -> None:
    edges = position_edges(length, buckets)
    assert edges[0] == 0
    assert edges[-1] == length
    assert len(edges) - 1 == min(buckets, length.bit_length())
    assert all(low < high for low, high in itertools.pairwise(edges))
    assert all(high // 2 == low for low, high in itertools.pairwise(edges[1:]))


def test_each_bucket_has_its_own_loss(fake, batches) -> None:
    # The target's logit is the position p and all others are 0, so that the loss at p is ln(259 + e^p) - p.
    following = {
        (batch.tokens_BT[row, time].item(), batch.positions_BT[row, time].item()): batch.tokens_BT[
            row, time + 1
        ].item()
        for batch in batches
        for row in range(2)
        for time in range(6)
    }

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        targets = torch.tensor(
            [
                [following[pair] for pair in zip(*row, strict=True)]
                for row in zip(ids.tolist(), positions.tolist(), strict=True)
            ]
        )
        return functional.one_hot(targets, 260).double() * positions.unsqueeze(-1)

    def loss(position: int) -> float:
        return math.log(259 + math.exp(position)) - position

    # Predicting positions of the targets that count: [0..5], [0, 1] + [0, 1, 2], [0] * 3, [0..3].
    counts = {0: 1 + 2 + 3 + 1, 1: 1 + 2 + 1, 2: 1 + 1 + 1, 3: 1 + 1, 4: 1, 5: 1}
    rows = loss_by_position(fake(logits), batches, [0, 1, 3, 6, 99])
    assert [row["position"] for row in rows] == [0, 1, 3]
    for row, positions in zip(rows, ([0], [1, 2], [3, 4, 5]), strict=True):
        count = sum(counts[position] for position in positions)
        assert row["count"] == count
        expected = sum(counts[position] * loss(position) for position in positions) / count
        assert row["loss"] == pytest.approx(expected, rel=1e-10)


def test_refusals(uniform, batches) -> None:
    with pytest.raises(ValueError, match="positions span 0 to 5"):
        loss_by_position(uniform, batches, [0, 5])
    with pytest.raises(ValueError, match="two increasing positions"):
        loss_by_position(uniform, batches, [0, 4, 4])
    with pytest.raises(ValueError, match="buckets is 0"):
        position_edges(8, 0)
