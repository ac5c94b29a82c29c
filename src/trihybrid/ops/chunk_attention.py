"""Causal attention of a chunk of tokens over all tokens up to its end, in constant extra memory.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s    over the s <= t (with t - s < window)

Legend: B batch, T queries, S keys, W window, C blocks of W queries, H query heads, G key/value heads, R heads of a
group, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from trihybrid.ops.sliding_attention.flash import flash_end, no_flash, takes_flash

PAIRS = 2**21
"""Query-key pairs that are masked at a time, heads of a group counted."""


def chunk_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    window: int | None,
    scale: float,
    pairs: int = PAIRS,
) -> Tensor:
    """[B, T, H, D] in the queries' dtype. The queries are those of the last T of the S tokens.

    Args:
        q_BTHD: queries; head h reads key/value head h // (H / G). T is at most S.
        k_BSGD, v_BSGD: keys and values, oldest first, any strides but the last.
        window: how many tokens a query reads, itself included; None for all.
        scale: factor on the scores.
        pairs: the extra memory, in pairs of a query and a key (a byte or four each); at least one query is worked on
            at a time.

    On a GPU in half precision attention without a window is one of torch's fused kernels, which need no mask, and with
    a window torch's FlashAttention, which skips what lies before it; where that is not to be had, chunks that are
    longer than a window are cut into blocks of W queries that read 2 W keys each, all at once. Everywhere else queries
    are taken a few at a time, each with a mask over the keys that it reaches.
    """
    length, total = q_BTHD.shape[1], k_BSGD.shape[1]
    half = q_BTHD.is_cuda and q_BTHD.dtype in (torch.bfloat16, torch.float16)
    if half and (window is None or window >= total):
        return _fused(q_BTHD, k_BSGD, v_BSGD, scale)
    if half and window is not None and _takes_flash(q_BTHD):
        return flash_end(q_BTHD, k_BSGD, v_BSGD, window, scale)
    if half and window is not None and length > window:
        return window_blocks(q_BTHD, k_BSGD, v_BSGD, window, scale)
    groups, repeats = k_BSGD.shape[2], q_BTHD.shape[2] // k_BSGD.shape[2]
    k_BGSD, v_BGSD = k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2)
    before = total - length
    place_S = torch.arange(total, device=q_BTHD.device)
    o_BTHD = torch.empty_like(q_BTHD)
    rows = _rows(length, total, window, pairs // repeats)
    for start in range(0, length, rows):
        end = min(start + rows, length)
        oldest = 0 if window is None else max(0, before + start - window + 1)
        distance_TS = place_S[before + start : before + end, None] - place_S[oldest : before + end]
        seen_TS = distance_TS >= 0
        if window is not None:
            seen_TS &= distance_TS < window
        q_BGRTD = q_BTHD[:, start:end].unflatten(2, (groups, repeats)).permute(0, 2, 3, 1, 4)
        # The heads of a group stand as queries beside each other, so that keys and values are not repeated.
        o_BGQD = F.scaled_dot_product_attention(
            q_BGRTD.flatten(2, 3),
            k_BGSD[:, :, oldest : before + end],
            v_BGSD[:, :, oldest : before + end],
            attn_mask=seen_TS.repeat(repeats, 1),
            scale=scale,
        )
        o_BGRTD = o_BGQD.unflatten(2, (repeats, end - start))
        o_BTHD[:, start:end] = o_BGRTD.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return o_BTHD


def window_blocks(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, window: int, scale: float) -> Tensor:
    """`chunk_attention` with a window, in one call of torch's attention over T / W blocks."""
    batch, length, heads, width = q_BTHD.shape
    groups = k_BSGD.shape[2]
    blocks = -(-length // window)
    # Block c holds the queries from c W on, and reads the W keys before its first query and its own W.
    before = k_BSGD.shape[1] - length
    kept, missing, behind = min(before, window), max(0, window - before), blocks * window - length
    q_BCHWD = F.pad(q_BTHD, (0, 0, 0, 0, 0, behind)).unflatten(1, (blocks, window)).transpose(2, 3)

    def spread(x_BSGD: Tensor) -> Tensor:
        padded = F.pad(x_BSGD[:, before - kept :], (0, 0, 0, 0, missing, behind))
        x_BCGDK = padded.unfold(1, 2 * window, window)
        x_BCHKD = x_BCGDK.transpose(-1, -2)[:, :, :, None].expand(-1, -1, -1, heads // groups, -1, -1)
        return x_BCHKD.flatten(2, 3).flatten(0, 1)

    distance_WK = torch.arange(window, 2 * window, device=q_BTHD.device)[:, None] - torch.arange(
        2 * window, device=q_BTHD.device
    )
    seen_CWK = ((distance_WK >= 0) & (distance_WK < window)).repeat(blocks, 1, 1)
    seen_CWK[0, :, :missing] = False
    o_AHWD = F.scaled_dot_product_attention(
        q_BCHWD.flatten(0, 1),
        spread(k_BSGD),
        spread(v_BSGD),
        attn_mask=seen_CWK.repeat(batch, 1, 1)[:, None],
        scale=scale,
    )
    return o_AHWD.transpose(1, 2).reshape(batch, blocks * window, heads, width)[:, :length]


def _fused(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, scale: float) -> Tensor:
    """Without a window, by torch's kernels; heads wider than 256 have one that takes no groups."""
    heads, groups = q_BTHD.shape[2], k_BSGD.shape[2]
    k_BGSD, v_BGSD = k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2)
    grouped = heads != groups
    if grouped and q_BTHD.shape[3] > 256:
        # One key/value head becomes a view, several are copied.
        k_BGSD, v_BGSD = (
            x.expand(-1, heads, -1, -1) if groups == 1 else x.repeat_interleave(heads // groups, 1)
            for x in (k_BGSD, v_BGSD)
        )
        grouped = False
    o_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BGSD,
        v_BGSD,
        attn_mask=causal_lower_right(q_BTHD.shape[1], k_BSGD.shape[1]),
        scale=scale,
        enable_gqa=grouped,
    )
    return o_BHTD.transpose(1, 2)


def _rows(length: int, total: int, window: int | None, pairs: int) -> int:
    """Queries of a block: as many as `pairs` allow. With a window a block of n reaches n + window keys."""
    if window is None:
        return max(1, min(length, pairs // total))
    return max(1, min(length, window, pairs // (2 * window)))


def _takes_flash(q_BTHD: Tensor) -> bool:
    return no_flash(q_BTHD.device) is None and takes_flash(q_BTHD.shape[-1], q_BTHD.dtype) is None
