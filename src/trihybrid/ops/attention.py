"""Grouped causal attention over keys that may be longer than the queries.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trihybrid.ops.window_attention import fits, window_attention


def attention(
    q_BTHD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible_BTS: Tensor | None, scale: float
) -> Tensor:
    """Softmax attention with grouped heads: query head h reads key/value head h // (H / G).

    Args:
        q_BTHD: queries [B, T, H, D].
        k_BGSD, v_BGSD: keys and values [B, G, S, D], oldest first; H must be a multiple of G.
        visible_BTS: bool [B or 1, T, S], True where query t may read key s. None means plain causal attention of T
            queries over the same T tokens (S == T), or of one query over every key (T == 1).
        scale: factor on the scores, 1/sqrt(D) in the usual definition.

    Returns:
        [B, T, H, D] in the queries' dtype. A row in which nothing is visible is zero, not NaN.
    """
    heads, groups = q_BTHD.shape[2], k_BGSD.shape[1]
    if heads % groups:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {groups} key/value heads")
    mask = None if visible_BTS is None else visible_BTS[:, None]
    o_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BGSD.repeat_interleave(heads // groups, dim=1),
        v_BGSD.repeat_interleave(heads // groups, dim=1),
        attn_mask=mask,
        is_causal=mask is None and q_BTHD.shape[1] > 1,
        scale=scale,
    )
    if mask is not None:
        # A fully masked row (a padding token) has no softmax; its value must not poison what it is multiplied with.
        o_BHTD = torch.where(
            mask.any(-1, keepdim=True), o_BHTD, torch.zeros((), dtype=o_BHTD.dtype, device=o_BHTD.device)
        )
    return o_BHTD.transpose(1, 2)


def block_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    positions_BT: Tensor,
    borders: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Causal attention of a block of tokens over itself: `attention` without earlier keys, by the fastest way there is.

    Args:
        q_BTHD, k_BTGD, v_BTGD: queries [B, T, H, D], keys and values [B, T, G, D]; H must be a multiple of G.
        positions_BT: int64, 0 at the first token of a document; a query reads no more than its position back.
        borders: whether some row holds more than one document.
        window: how many tokens a query reads, itself included; None for its whole document.
        scale: factor on the scores.

    In half precision on a GPU, plain causal attention is torch's fused kernel, and windows and documents are ours, in
    O(T window). Everywhere else a mask is made.
    """
    length = q_BTHD.shape[1]
    plain = not borders and (window is None or window >= length)
    half = q_BTHD.is_cuda and q_BTHD.dtype in (torch.bfloat16, torch.float16)
    if half and plain:
        q_BHTD, k_BGTD, v_BGTD = q_BTHD.transpose(1, 2), k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2)
        o_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, is_causal=True, scale=scale, enable_gqa=True
        )
        return o_BHTD.transpose(1, 2)
    if fits(q_BTHD, k_BTGD):
        return window_attention(q_BTHD, k_BTGD, v_BTGD, positions_BT, window or length, scale)
    visible_BTS = None
    if not plain:
        place_T = torch.arange(length, device=q_BTHD.device)
        distance_TT = place_T[:, None] - place_T
        reach_BT = positions_BT if window is None else positions_BT.clamp(max=window - 1)
        visible_BTS = (distance_TT >= 0) & (distance_TT <= reach_BT[:, :, None])
    return attention(q_BTHD, k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2), visible_BTS, scale)
