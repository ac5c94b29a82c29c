"""Grouped causal attention over keys that may be longer than the queries.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def attention(
    q_BTHD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible_BTS: Tensor | None, scale: float
) -> Tensor:
    """Softmax attention with grouped heads: query head h reads key/value head h // (H / G).

    Args:
        q_BTHD: queries [B, T, H, D].
        k_BGSD, v_BGSD: keys and values [B, G, S, D], oldest first; H must be a multiple of G.
        visible_BTS: bool [B or 1, T, S], True where query t may read key s. None means plain causal attention of the
            last T of the S tokens.
        scale: factor on the scores, 1/sqrt(D) in the usual definition.

    Returns:
        [B, T, H, D] in the queries' dtype. A row in which nothing is visible is zero, not NaN.
    """
    heads, groups = q_BTHD.shape[2], k_BGSD.shape[1]
    if heads % groups:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {groups} key/value heads")
    length, keys = q_BTHD.shape[1], k_BGSD.shape[2]
    mask = None if visible_BTS is None else visible_BTS[:, None]
    later = mask is None and 1 < length < keys
    o_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BGSD.repeat_interleave(heads // groups, dim=1),
        v_BGSD.repeat_interleave(heads // groups, dim=1),
        attn_mask=_lower_right(q_BTHD, keys) if later else mask,
        is_causal=mask is None and length > 1 and not later,
        scale=scale,
    )
    if mask is not None:
        # A fully masked row (a padding token) has no softmax; its value must not poison what it is multiplied with.
        o_BHTD = torch.where(
            mask.any(-1, keepdim=True), o_BHTD, torch.zeros((), dtype=o_BHTD.dtype, device=o_BHTD.device)
        )
    return o_BHTD.transpose(1, 2)


def _lower_right(q_BTHD: Tensor, keys: int) -> Tensor:
    """The mask [T, S] of the last T of S tokens: in half precision on a GPU torch's name of it, which its kernels take
    without a table."""
    length = q_BTHD.shape[1]
    if q_BTHD.is_cuda and q_BTHD.dtype in (torch.bfloat16, torch.float16):
        return causal_lower_right(length, keys)
    return torch.ones(length, keys, dtype=torch.bool, device=q_BTHD.device).tril(keys - length)
