"""Causal attention of a chunk of tokens over all tokens up to its end, in constant extra memory.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s    over the s <= t (with t - s < window)

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

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

    On a GPU, in half precision and up to a width of 256, attention without a window is torch's fused kernel, which
    needs no mask. Everywhere else queries are taken a block at a time, each with a mask over the keys that it reaches.
    """
    _, length, heads, width = q_BTHD.shape
    total, groups = k_BSGD.shape[1:3]
    k_BGSD, v_BGSD = k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2)
    half = q_BTHD.is_cuda and q_BTHD.dtype in (torch.bfloat16, torch.float16)
    if half and width <= 256 and (window is None or window >= total):
        o_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2), k_BGSD, v_BGSD, attn_mask=causal_lower_right(length, total), scale=scale,
            enable_gqa=heads != groups,
        )  # fmt: skip
        return o_BHTD.transpose(1, 2)
    before, repeats = total - length, heads // groups
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


def _rows(length: int, total: int, window: int | None, pairs: int) -> int:
    """Queries of a block: as many as `pairs` allow. With a window a block of n reaches n + window keys."""
    if window is None:
        return max(1, min(length, pairs // total))
    return max(1, min(length, window, pairs // (2 * window)))
