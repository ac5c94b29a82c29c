"""Grouped causal attention of a block of tokens over itself, by the fastest way there is.

Legend: B batch, T tokens, H query heads, G key/value heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trihybrid.ops.attention import attention
from trihybrid.ops.window_attention import fits, window_attention


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
