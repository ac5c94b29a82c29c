"""Grouped causal attention over keys that may be longer than the queries.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
