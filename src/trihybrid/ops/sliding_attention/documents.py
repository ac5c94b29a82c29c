"""Where the documents of a batch of rows begin.

Legend: B batch, T time, N documents.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Rows of whole documents; a row's first token begins one in any case.

    Attributes:
        positions_BT: int64, 0 at the first token of a document and counting up inside it.
        borders: whether some row holds more than one document.
        given: `packing`, where it is known already.
    """

    positions_BT: Tensor
    borders: bool
    given: tuple[Tensor, int] | None = None

    @cached_property
    def packing(self) -> tuple[Tensor, int]:
        """(starts_N: int32 [N + 1], where each document begins among all B T tokens, and B T at the end; the length of
        the longest). A GPU is waited for once where there are borders."""
        if self.given is not None:
            return self.given
        batch, length = self.positions_BT.shape
        device = self.positions_BT.device
        if not self.borders:
            return torch.arange(batch + 1, dtype=torch.int32, device=device) * length, length
        begins_BT = self.positions_BT == 0
        begins_BT[:, 0] = True
        starts_N = begins_BT.flatten().nonzero().squeeze(1)
        starts_N = torch.cat([starts_N, starts_N.new_tensor([batch * length])])
        return starts_N.int(), int(starts_N.diff().max())

    def padded(self, least: int) -> Tensor:
        """`starts_N` with empty documents at the end, `least` numbers in all or the next power of two: a size that
        seldom changes from batch to batch."""
        starts_N, _ = self.packing
        count = max(least, 1 << (len(starts_N) - 1).bit_length())
        return torch.cat([starts_N, starts_N[-1:].expand(count - len(starts_N))])

    def reach(self, window: int) -> Tensor:
        """How far back each token reads, int64 [B, T]: to its document's first token, never past the window."""
        length = self.positions_BT.shape[1]
        place_T = torch.arange(length, device=self.positions_BT.device)
        return torch.minimum(self.positions_BT, place_T).clamp(max=window - 1)
