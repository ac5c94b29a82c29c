"""Loss by position in the document: does a model make use of a longer context?"""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from trihybrid.data import Batch
from trihybrid.evaluate.scoring import Scores, score


def position_edges(sequence_length: int, buckets: int) -> list[int]:
    """Return buckets + 1 borders from 0 to sequence_length, each bucket twice as long as the one before it.

    The first starts at 0; fewer buckets come back where the halves would be shorter than one position.
    ValueError when either is below 1.
    """
    for name, count in (("sequence_length", sequence_length), ("buckets", buckets)):
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
    return [0, *sorted({sequence_length >> halving for halving in range(buckets)} - {0})]


class PositionMeter:
    """Sums the loss in buckets of restarting positions: bucket i holds edges[i] <= position < edges[i + 1].

    edges: increasing borders. ValueError when they are not, or a scored position lies outside of them.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        if len(edges) < 2 or any(low >= high for low, high in itertools.pairwise(edges)):
            raise ValueError(f"edges are {list(edges)}; they must be at least two increasing positions")
        self.edges = torch.tensor(edges)
        self.nats = torch.zeros(len(edges) - 1, dtype=torch.float64)
        self.counts = torch.zeros(len(edges) - 1, dtype=torch.int64)

    def add(self, scores: Scores) -> None:
        """Add the losses of one chunk to the buckets of their positions."""
        positions_N = scores.positions_N.cpu()
        buckets_N = torch.bucketize(positions_N, self.edges, right=True) - 1
        if int(buckets_N.min()) < 0 or int(buckets_N.max()) >= len(self.counts):
            raise ValueError(
                f"positions span {int(positions_N.min())} to {int(positions_N.max())}; edges {self.edges.tolist()} "
                "must cover them (the last one is excluded)"
            )
        self.nats.index_add_(0, buckets_N, scores.nats_N.double().cpu())
        self.counts.index_add_(0, buckets_N, torch.ones_like(buckets_N))

    def result(self) -> list[dict[str, int | float]]:
        """Return {position, loss, count} for each bucket that has tokens.

        position: the first position of the bucket. loss: mean nats a token. count: tokens.
        """
        return [
            {"position": position, "loss": nats / count, "count": count}
            for position, nats, count in zip(
                self.edges.tolist(), self.nats.tolist(), self.counts.tolist(), strict=False
            )
            if count
        ]


def loss_by_position(
    model: nn.Module, batches: Iterable[Batch], edges: Sequence[int]
) -> list[dict[str, int | float]]:
    """Mean loss in each bucket of positions between edges (see `PositionMeter` and `position_edges`)."""
    meter = PositionMeter(edges)
    score(model, batches, [meter])
    return meter.result()
