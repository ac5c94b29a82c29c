"""The definition: all scores, and a mask over them.

Legend: B batch, T time, S keys (T of them), H query heads, G key/value heads, D head width.
"""

import torch
from torch import Tensor

from trihybrid.ops.attention import attention
from trihybrid.ops.sliding_attention.documents import Documents


def dense(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, documents: Documents, window: int, scale: float
) -> Tensor:
    """O(T^2). A window that covers everything, without borders, needs no mask."""
    length = q_BTHD.shape[1]
    visible_BTS = None
    if documents.borders or window < length:
        place_T = torch.arange(length, device=q_BTHD.device)
        distance_TS = place_T[:, None] - place_T
        visible_BTS = (distance_TS >= 0) & (distance_TS <= documents.reach(window)[:, :, None])
    return attention(q_BTHD, k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2), visible_BTS, scale)
