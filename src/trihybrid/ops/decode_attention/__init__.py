"""Attention of one query a sequence over keys and values that lie in a store: what decoding asks for.

    o_h = sum_s softmax_s(scale q_h . k_s) v_s    over the first `length` tokens s of the sequence

Bound by the bytes of keys and values. A store is in pages: token s of sequence b lies in page table[b, s // L] at place
s % L. A dense store, one line a sequence (a window's ring, whose order does not matter), has one page a sequence.

On a GPU in half precision the kernel of `triton` reads the pages where they lie, each once for all heads of a group,
and splits a sequence over many programs. Everywhere else pages are gathered, and torch's attention reads the copy.

Legend: B sequences, H query heads, G key/value heads, D head width, S tokens of a line, P pages, L tokens of a page,
M pages of a sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["decode_attention", "fits", "paged_attention"]


def fits(q_BHD: Tensor, keys_PLGD: Tensor) -> bool:
    """Whether the kernel takes these: a GPU, half precision, widths 16 to 512 and at most 16 heads a group."""
    half = q_BHD.dtype in (torch.bfloat16, torch.float16)
    sizes = q_BHD.shape[2] in (16, 32, 64, 128, 256, 512) and q_BHD.shape[1] <= 16 * keys_PLGD.shape[2]
    return q_BHD.is_cuda and half and sizes


def decode_attention(
    q_BHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    lengths_B: Tensor,
    scale: float,
    seen_BS: Tensor | None = None,
) -> Tensor:
    """[B, H, D] in the queries' dtype, over the first `lengths_B[b]` tokens of line b.

    Args:
        q_BHD: queries; head h reads key/value head h // (H / G).
        k_BSGD, v_BSGD: keys and values, any strides but the last. What lies behind a length must be finite.
        lengths_B: int64, at least 1.
        scale: factor on the scores.
        seen_BS: which tokens a line's length covers, where the caller has it.
    """
    if fits(q_BHD, k_BSGD):
        lines_B1 = torch.arange(k_BSGD.shape[0], device=q_BHD.device)[:, None]
        return _over_pages(q_BHD, k_BSGD, v_BSGD, lines_B1, lengths_B, scale)
    batch, heads, width = q_BHD.shape
    groups = k_BSGD.shape[2]
    # The heads of a group stand as queries beside each other, so that keys and values are read once.
    q_BGRD = q_BHD.view(batch, groups, heads // groups, width)
    if seen_BS is None:
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
    seen_BS: Tensor | None = None,
) -> Tensor:
    """As `decode_attention`, with keys and values in pages: [B, H, D].

    Args:
        keys_PLGD, values_PLGD: the store.
        table_BM: int64, pages of each sequence in their order; entries behind its length name any page.
    """
    if fits(q_BHD, keys_PLGD):
        return _over_pages(q_BHD, keys_PLGD, values_PLGD, table_BM, lengths_B, scale)
    k_BSGD, v_BSGD = keys_PLGD[table_BM].flatten(1, 2), values_PLGD[table_BM].flatten(1, 2)
    return decode_attention(q_BHD, k_BSGD, v_BSGD, lengths_B, scale, seen_BS)


@torch.library.custom_op("trihybrid::paged_attention", mutates_args=(), device_types="cuda")
def _over_pages(
    q_BHD: Tensor, keys_PLGD: Tensor, values_PLGD: Tensor, table_BM: Tensor, lengths_B: Tensor, scale: float
) -> Tensor:
    from trihybrid.ops.decode_attention.triton import launch

    return launch(q_BHD.contiguous(), keys_PLGD, values_PLGD, table_BM, lengths_B, scale)


@_over_pages.register_fake
def _(
    q_BHD: Tensor, keys_PLGD: Tensor, values_PLGD: Tensor, table_BM: Tensor, lengths_B: Tensor, scale: float
) -> Tensor:
    return q_BHD.new_empty(q_BHD.shape)
