"""Where a block of tokens stands, and how it meets the stored states: a chunk of one sequence, or one token of each of
several.

Both write first and read then. `Chunk` knows its sizes on the host and works on one row. `Turn` is tensors alone, with
shapes that depend on nothing but the number of rows and of pages in its table, so that a CUDA graph or a compiler can
record what is done with it.

Legend: B sequences, T tokens, H query heads, G key/value heads, N head width, C = H N channels, M pages in a table, S
keys.
"""

from typing import Protocol

import torch
from torch import Tensor

from trihybrid.infer.network.parts import Fusion
from trihybrid.infer.states import Stored
from trihybrid.mixers.contract import Shared
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.span import Span
from trihybrid.mixers.state import RecurrentState
from trihybrid.ops.chunk_attention import chunk_attention
from trihybrid.ops.decode_attention import decode_attention, paged_attention
from trihybrid.ops.wkv7.decode import wkv7_step_

KeysValues = tuple[Tensor, Tensor]


class Place(Protocol):
    """A block of tokens in the states.

    Attributes:
        span: positions, for the mixers.
        shared: what the mixers publish for each other.
        rotary: layer type -> cosines and sines, as the first layer of that type has made them.
        fusion: what stands between the matrix products.
    """

    fusion: Fusion

    span: Span
    shared: Shared
    rotary: dict[str, KeysValues]

    def window(self, ring: Stored, q_BTHN: Tensor, new: KeysValues | None, scale: float) -> Tensor:
        """Attention over a ring, [B, T, H, N], after the block's own keys and values [B, T, G, N] are put there; None
        where another layer of this block did that."""
        ...

    def whole(self, pages: Stored, q_BTHN: Tensor, new: KeysValues | None, scale: float) -> Tensor:
        """Likewise over pages."""
        ...

    def recur(self, matrix: Tensor, rwkv7: Rwkv7, x_BTD: Tensor) -> Tensor:
        """What the recurrence reads, gated, [B, T, C]; its rows of the store [R, H, N, N] move on."""
        ...


class Turn:
    """One token of each of B sequences, in rows 0 to B - 1.

    Args:
        positions_B1: int64, how many tokens each has seen.
        table_BM: int64, its pages; entries behind its length name any page.
        length: tokens of a page.
        fusion: see `Place`.
    """

    def __init__(self, positions_B1: Tensor, table_BM: Tensor, length: int, fusion: Fusion) -> None:
        self.fusion = fusion
        self.span, self.shared = Span(positions_B1), Shared()
        self.rotary: dict[str, KeysValues] = {}
        self._rows = slice(positions_B1.shape[0])
        self._table_BM = table_BM
        self._positions_B = positions_B1[:, 0]
        self._lengths_B = self._positions_B + 1
        self._line_B = torch.arange(positions_B1.shape[0], device=positions_B1.device)
        # Window, or 0 for pages -> place of the new token, length, and which tokens of a line that covers.
        self._lines: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._page_B = table_BM.gather(1, positions_B1 // length)[:, 0]
        self._place_B = self._positions_B % length

    def window(self, ring: Stored, q_BTHN: Tensor, new: KeysValues | None, scale: float) -> Tensor:
        k_BWGN, v_BWGN = ring.keys[self._rows], ring.values[self._rows]
        window = k_BWGN.shape[1]
        if window not in self._lines:
            lengths_B = self._lengths_B.clamp(max=window)
            self._lines[window] = self._positions_B % window, lengths_B, self._seen(window, lengths_B)
        place_B, lengths_B, seen_BW = self._lines[window]
        if new is not None:
            k_BWGN[self._line_B, place_B], v_BWGN[self._line_B, place_B] = new[0][:, 0], new[1][:, 0]
        return decode_attention(q_BTHN[:, 0], k_BWGN, v_BWGN, lengths_B, scale, seen_BW)[:, None]

    def whole(self, pages: Stored, q_BTHN: Tensor, new: KeysValues | None, scale: float) -> Tensor:
        if new is not None:
            pages.keys[self._page_B, self._place_B] = new[0][:, 0]
            pages.values[self._page_B, self._place_B] = new[1][:, 0]
        if 0 not in self._lines:
            width = self._table_BM.shape[1] * pages.keys.shape[1]
            self._lines[0] = self._place_B, self._lengths_B, self._seen(width, self._lengths_B)
        _, lengths_B, seen_BS = self._lines[0]
        o_BHN = paged_attention(
            q_BTHN[:, 0], pages.keys, pages.values, self._table_BM, lengths_B, scale, seen_BS
        )
        return o_BHN[:, None]

    def _seen(self, width: int, lengths_B: Tensor) -> Tensor:
        return torch.arange(width, device=lengths_B.device) < lengths_B[:, None]

    def recur(self, matrix: Tensor, rwkv7: Rwkv7, x_BTD: Tensor) -> Tensor:
        operands = rwkv7.operands(x_BTD, self.span, self.shared, self.fusion.prepared)
        o_BTHN = wkv7_step_(*operands.tokens, matrix[self._rows])
        return rwkv7.reads(o_BTHN, operands) * operands.gate_BTC


class Chunk:
    """T tokens of one sequence, behind `start` others.

    Args:
        row: its row.
        start: tokens that its states have seen.
        tokens: T, at least 1.
        pages: its pages, in order; enough for all tokens up to the end of the chunk.
        length: tokens of a page.
        device: of the states.
    """

    def __init__(
        self, row: int, start: int, tokens: int, pages: list[int], length: int, device: torch.device
    ) -> None:
        self.fusion = Fusion.of_kernels()
        positions_T = torch.arange(start, start + tokens, device=device)
        self.span, self.shared = Span(positions_T[None], start), Shared()
        self.rotary: dict[str, KeysValues] = {}
        self._row, self._start, self._end = row, start, start + tokens
        self._pages, self._table_M = pages[: -(-self._end // length)], None
        if self._pages and self._pages != list(range(self._pages[0], self._pages[0] + len(self._pages))):
            self._table_M = torch.tensor(self._pages, dtype=torch.int64, device=device)
            self._page_T, self._place_T = self._table_M[positions_T // length], positions_T % length
        self._seen: dict[int, KeysValues] = {}

    def window(self, ring: Stored, q_BTHN: Tensor, new: KeysValues | None, scale: float) -> Tensor:
        if new is not None:
            # Those that read this ring too need what the chunk is about to overwrite.
            self._seen[id(ring)] = self._push(ring.keys, new[0][0]), self._push(ring.values, new[1][0])
        k_SGN, v_SGN = self._seen[id(ring)]
        return chunk_attention(q_BTHN, k_SGN[None], v_SGN[None], ring.keys.shape[1], scale)

    def _push(self, lines: Tensor, new_TGN: Tensor) -> Tensor:
        """Put the chunk into a ring; returns the tokens that it reads, oldest first: of the ring, then its own."""
        line_WGN = lines[self._row]
        window, oldest = line_WGN.shape[0], self._start % line_WGN.shape[0]
        before = [line_WGN[oldest + 1 :], line_WGN[:oldest]] if self._start >= window else [line_WGN[:oldest]]
        seen_SGN = torch.cat([*before, new_TGN])
        newest_TGN = new_TGN[-window:]
        first = (self._end - len(newest_TGN)) % window
        ahead = window - first
        line_WGN[first : first + len(newest_TGN)] = newest_TGN[:ahead]
        if len(newest_TGN) > ahead:
            line_WGN[: len(newest_TGN) - ahead] = newest_TGN[ahead:]
        return seen_SGN

    def whole(self, pages: Stored, q_BTHN: Tensor, new: KeysValues | None, scale: float) -> Tensor:
        if new is not None:
            self._write(pages.keys, new[0][0])
            self._write(pages.values, new[1][0])
        return chunk_attention(q_BTHN, self._read(pages.keys), self._read(pages.values), None, scale)

    def _write(self, store_PLGN: Tensor, new_TGN: Tensor) -> None:
        if self._table_M is None:
            self._read(store_PLGN)[0, self._start :] = new_TGN
        else:
            store_PLGN[self._page_T, self._place_T] = new_TGN

    def _read(self, store_PLGN: Tensor) -> Tensor:
        """All tokens up to the chunk's end, [1, S, G, N]: a view where its pages are one run, else a copy."""
        if self._table_M is None:
            dense_MLGN = store_PLGN[self._pages[0] : self._pages[0] + len(self._pages)]
        else:
            dense_MLGN = store_PLGN[self._table_M]
        return dense_MLGN.flatten(0, 1)[None, : self._end]

    def recur(self, matrix: Tensor, rwkv7: Rwkv7, x_BTD: Tensor) -> Tensor:
        state_BHNN = matrix[self._row : self._row + 1]
        before = RecurrentState(state_BHNN)
        o_BTC, gate_BTC, after = rwkv7.recur(x_BTD, self.span, before, self.shared, self.fusion.rates)
        state_BHNN.copy_(after.matrix_BHKV)
        return o_BTC * gate_BTC
