"""Grouped causal attention over keys that may be longer than the queries.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from trihybrid.ops.window_attention import fits, window_attention

FLEX_BLOCK = 128  # queries and keys of a block; FlexAttention's own default


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

    In half precision on a GPU, plain causal attention is torch's fused kernel, a window ours in O(T window), and whole
    documents inside torch.compile FlexAttention. Everywhere else a mask is made.
    """
    length = q_BTHD.shape[1]
    windowed = window is not None and window < length
    half = q_BTHD.is_cuda and q_BTHD.dtype in (torch.bfloat16, torch.float16)
    if half and not windowed and not borders:
        q_BHTD, k_BGTD, v_BGTD = q_BTHD.transpose(1, 2), k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2)
        o_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, is_causal=True, scale=scale, enable_gqa=True
        )
        return o_BHTD.transpose(1, 2)
    if windowed and fits(q_BTHD, k_BTGD):
        assert window is not None
        return window_attention(q_BTHD, k_BTGD, v_BTGD, positions_BT, window, scale)
    if half and torch.compiler.is_compiling() and length % FLEX_BLOCK == 0:
        return band_attention(q_BTHD, k_BTGD, v_BTGD, positions_BT, window, scale)
    distance_TT = torch.arange(length, device=q_BTHD.device)[:, None] - torch.arange(
        length, device=q_BTHD.device
    )
    reach_BT = positions_BT if window is None else positions_BT.clamp(max=window - 1)
    visible_BTS = (distance_TT >= 0) & (distance_TT <= reach_BT[:, :, None])
    plain = not windowed and not borders
    return attention(
        q_BTHD, k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2), None if plain else visible_BTS, scale
    )


def band_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    positions_BT: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    """`block_attention` by FlexAttention, for T in multiples of `FLEX_BLOCK`; meant for torch.compile.

    The blocks are those of the window alone, the same for every batch: what belongs to another document is masked
    inside them, which costs less than finding its blocks.
    """
    blocks = q_BTHD.shape[1] // FLEX_BLOCK
    reach = blocks - 1 if window is None else min(blocks - 1, (window + FLEX_BLOCK - 2) // FLEX_BLOCK)
    row = torch.arange(blocks, device=q_BTHD.device, dtype=torch.int32)
    first = (row - reach).clamp(min=0)
    indices = (first[:, None] + row).clamp(max=blocks - 1)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        seen = (distance >= 0) & (distance <= positions_BT[batch, query])
        return seen if window is None else seen & (distance < window)

    mask = BlockMask.from_kv_blocks(
        (row - first + 1)[None, None],
        indices[None, None].to(torch.int32),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(q_BTHD.shape[1], k_BTGD.shape[1]),
    )
    o_BHTD = flex_attention(
        q_BTHD.transpose(1, 2),
        k_BTGD.transpose(1, 2),
        v_BTGD.transpose(1, 2),
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    assert isinstance(o_BHTD, Tensor)
    return o_BHTD.transpose(1, 2)
