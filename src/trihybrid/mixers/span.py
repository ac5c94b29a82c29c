"""Where a block of tokens stands: positions in their documents, what came before, what is padding.

One `Span` is built per forward pass and every layer reads it, so that a window, a recurrence and a growing attention
can never disagree about a document border. Legend: B batch, T tokens of this block, S keys.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trihybrid.ops.part import Part


@dataclass(frozen=True)
class Span:
    """A block of T tokens for each of B rows.

    Attributes:
        positions_BT: int64, 0 at the first token of a document and counting up inside it.
        start: number of tokens that every row has already put into its state (padding counted).
        valid_BT: bool, False on padding; None when nothing is padding.
        borders: whether some row holds more than one document, up to the end of this block.
        part: the block is this part of rows that lie on several processes, and its mixers ask it for what the parts
            before have, in the place of a state. None where a process has all of a row.
    """

    positions_BT: Tensor
    start: int = 0
    valid_BT: Tensor | None = None
    borders: bool = False
    part: Part | None = None

    @property
    def length(self) -> int:
        return self.positions_BT.shape[1]

    @property
    def reset_BT(self) -> Tensor | None:
        """True where the state must be zero before the token; None when that happens nowhere."""
        return self.positions_BT == 0 if self.borders else None

    def visible(self, keys: int, window: int | None = None, first: int = 0) -> Tensor | None:
        """Which of `keys` stored tokens each query may read, bool [B, T, keys], or None for plain causal attention
        (in a part, of the last T of the keys).

        Args:
            keys: number of stored keys; those at or after the end of this block (a preallocated cache) are hidden.
            window: how many tokens back a query reads, itself included; None means the whole document.
            first: absolute index of the first stored key (a sliding state has dropped the older ones).

        A key of absolute index s is visible to the query of absolute index t when s <= t, when it belongs to the same
        document (t - s <= position of the query) and when t - s < window. Left padding is an earlier document.
        """
        end = self.start + self.length
        simple = self.valid_BT is None and not self.borders and (window is None or end - first <= window)
        plain = self.start == first or self.length == 1 or self.part is not None
        if simple and first + keys == end and plain:
            return None
        device = self.positions_BT.device
        query_T = torch.arange(self.start, end, device=device)
        distance_TS = query_T[:, None] - torch.arange(first, first + keys, device=device)
        reach_BT = self.positions_BT if window is None else self.positions_BT.clamp(max=window - 1)
        return (distance_TS >= 0) & (distance_TS <= reach_BT[:, :, None])


def contiguous(batch: int, length: int, start: int = 0, device: torch.device | str = "cpu") -> Span:
    """One document a row, without padding, of which `start` tokens came before."""
    positions_T = torch.arange(start, start + length, device=device)
    return Span(positions_T.expand(batch, length), start)


def packed(positions_BT: Tensor, start: int = 0) -> Span:
    """Several documents a row, from positions that restart at 0 where a document begins.

    Raises:
        ValueError: if positions do not count up by one between restarts.
    """
    step_BT = positions_BT[:, 1:] - positions_BT[:, :-1]
    if not bool(((step_BT == 1) | (positions_BT[:, 1:] == 0)).all()):
        raise ValueError(
            "positions of packed documents must count up by 1 and restart at 0 where a document begins"
        )
    # A block that begins inside a later document has no restart of its own, and still must not see earlier documents.
    borders = bool((positions_BT[:, 1:] == 0).any()) or bool((positions_BT[:, 0] != start).any())
    return Span(positions_BT, start, borders=borders)


def part_of_rows(positions_BT: Tensor, part: Part) -> Span:
    """One part of rows of documents, from the positions of its own tokens; all parts are equally long. The mixers of
    converted students, `rwkv7` and `tica`, know of parts.

    Raises:
        ValueError: as `packed`.
    """
    return replace(packed(positions_BT, part.index * positions_BT.shape[1]), part=part)


def from_lengths(lengths: list[int], device: torch.device | str = "cpu") -> Span:
    """One row that holds documents of the given lengths one after another."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"document lengths must be at least 1, got {lengths}")
    return packed(torch.cat([torch.arange(length, device=device) for length in lengths])[None])


def padded(mask_BS: Tensor, length: int, start: int = 0) -> Span:
    """One document a row with padding on one side, from a 2-D mask over all tokens seen so far (1 real, 0 padding).

    Raises:
        ValueError: if the mask does not cover `start + length` tokens or has padding between real tokens.
    """
    if mask_BS.dim() != 2 or mask_BS.shape[1] != start + length:
        raise ValueError(
            f"attention_mask has shape {tuple(mask_BS.shape)}; expected [batch, {start + length}]: "
            f"{start} tokens in the cache and {length} new ones"
        )
    mask_BS = mask_BS.bool()
    if bool(mask_BS.all()):
        return contiguous(mask_BS.shape[0], length, start, mask_BS.device)
    changes_B = (mask_BS[:, 1:] != mask_BS[:, :-1]).sum(1)
    if not bool((changes_B <= 1).all()):
        raise ValueError(
            "attention_mask has padding between real tokens; pad on one side only, or pack with position_ids"
        )
    positions_BS = (mask_BS.long().cumsum(1) - 1).clamp(min=0)
    valid_BT = mask_BS[:, start:]
    return Span(positions_BS[:, start:], start, valid_BT)
