"""Attention of one query a sequence over keys and values that lie in a store: what decoding asks for.

    o_h = sum_s softmax_s(scale q_h . k_s) v_s    over the first `length` tokens s of the sequence

Bound by the bytes of keys and values. A store is dense, one line of tokens a sequence (a window's ring, whose order
does not matter), or in pages: token s of sequence b lies in page table[b, s // L] at place s % L.

Legend: B sequences, H query heads, G key/value heads, D head width, S tokens of a line, P pages, L tokens of a page,
M pages of a sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["decode_attention", "paged_attention"]


def decode_attention(
    q_BHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, lengths_B: Tensor, scale: float
) -> Tensor:
    """[B, H, D] in the queries' dtype, over the first `lengths_B[b]` tokens of line b.

    Args:
        q_BHD: queries; head h reads key/value head h // (H / G).
        k_BSGD, v_BSGD: keys and values, any strides but the last. What lies behind a length must be finite.
        lengths_B: int64, at least 1.
        scale: factor on the scores.
    """
    batch, heads, width = q_BHD.shape
    groups = k_BSGD.shape[2]
    # The heads of a group stand as queries beside each other, so that keys and values are read once.
    q_BGRD = q_BHD.view(batch, groups, heads // groups, width)
    seen_BS = torch.arange(k_BSGD.shape[1], device=q_BHD.device) < lengths_B[:, None]
    o_BGRD = F.scaled_dot_product_attention(
        q_BGRD, k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2), attn_mask=seen_BS[:, None, None], scale=scale
    )
    return o_BGRD.reshape(batch, heads, width)


def paged_attention(
    q_BHD: Tensor,
    keys_PLGD: Tensor,
    values_PLGD: Tensor,
    table_BM: Tensor,
    lengths_B: Tensor,
    scale: float,
) -> Tensor:
    """As `decode_attention`, with keys and values in pages: [B, H, D].

    Args:
        keys_PLGD, values_PLGD: the store.
        table_BM: int64, pages of each sequence in their order; entries behind its length name any page.
    """
    k_BSGD, v_BSGD = keys_PLGD[table_BM].flatten(1, 2), values_PLGD[table_BM].flatten(1, 2)
    return decode_attention(q_BHD, k_BSGD, v_BSGD, lengths_B, scale)
