"""Embeddings and head of which each worker holds some rows.

A token's row is looked up by the worker that has it, for all workers, so that no table is ever whole; the sum over
workers, of which all but one say zero, is exact. The head is needed whole, and gathered for the loss.
Legend: V vocabulary, D width of a row, N tokens, W workers.
"""

import torch
from torch import Tensor, nn

from trihybrid.train.distributed import Workers
from trihybrid.train.rows import Rows, padded


class TableRows(nn.Module):
    """One worker's rows of a frozen table.

    Args:
        table: an embedding of any class, or a head; its weight is replaced by this worker's rows.
        workers: those who share it.
    """

    def __init__(self, table: nn.Embedding | nn.Linear, workers: Workers) -> None:
        super().__init__()
        whole_VD = table.weight.detach()
        self.rows = Rows(tuple(whole_VD.shape), workers.rank, workers.count)
        self.workers = workers
        own = padded(self.rows, whole_VD, workers.device)
        if isinstance(table, nn.Embedding):
            # It would point behind the rows that are here, and matters to gradients only.
            table.padding_idx = None
        table.weight = nn.Parameter(own, requires_grad=False)
        self.table = table

    @property
    def weight(self) -> Tensor:
        """The whole table [V, D], gathered each time it is asked for: by all workers at once, or by none."""
        with torch.no_grad():
            return self.workers.gather(self.table.weight)[: self.rows.whole[0]]

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """What the table makes of ids, int64 [...]: [..., D]. All workers look up equally many at once."""
        asked_WN = self.workers.gather(ids.reshape(1, -1)) - self.rows.rank * self.rows.share
        here_WN = (asked_WN >= 0) & (asked_WN < self.rows.share)
        found_WND = self.table(asked_WN.clamp(0, self.rows.share - 1)) * here_WN[..., None]
        return self.workers.exchange(found_WND).sum(0).view(*ids.shape, -1)
