"""Blocks of queries, each over its own block of keys and the one before: linear in T.

    a block is at least a window long, so that what its queries see lies in these two blocks

Legend: B batch, T time, M blocks, C tokens of a block, S = 2 C keys of a block of queries, H query heads, G key/value
heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trihybrid.ops.sliding_attention.dense import dense
from trihybrid.ops.sliding_attention.documents import Documents

SHORTEST = 64
ALIGNMENT = 16
"""torch's memory-efficient attention wants rows of a mask to begin at multiples of 16 bytes."""


def blocked(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    documents: Documents,
    window: int,
    scale: float,
    shortest: int = SHORTEST,
) -> Tensor:
    """`dense` in O(T window): torch's attention, with the blocks as its batch. A block has at least `shortest` tokens;
    where one holds the whole row there is nothing to cut."""
    batch, length, heads, width = q_BTHD.shape
    size = -(-max(window, shortest) // ALIGNMENT) * ALIGNMENT
    if size >= length:
        return dense(q_BTHD, k_BTGD, v_BTGD, documents, window, scale)
    count = -(-length // size)
    behind = count * size - length
    q_XHCD = _cut(q_BTHD, 0, behind, size).flatten(0, 1).transpose(1, 2)
    keys_XHSD, values_XHSD = (_neighbours(x_BTGD, behind, size, heads) for x_BTGD in (k_BTGD, v_BTGD))
    # From a query to a key: C further back in the first of the two blocks.
    place_C = torch.arange(size, device=q_BTHD.device)
    distance_CS = size + place_C[:, None] - torch.arange(2 * size, device=q_BTHD.device)
    # Queries behind the row's end read themselves: a row of no keys has no softmax.
    reach_BMC = F.pad(documents.reach(window), (0, behind)).view(batch, count, size)
    visible_XCS = ((distance_CS >= 0) & (distance_CS <= reach_BMC[..., None])).flatten(0, 1)
    o_XHCD = F.scaled_dot_product_attention(
        q_XHCD, keys_XHSD, values_XHSD, attn_mask=visible_XCS[:, None], scale=scale
    )
    return o_XHCD.transpose(1, 2).reshape(batch, count * size, heads, width)[:, :length]


def _cut(x_BTGD: Tensor, before: int, behind: int, size: int) -> Tensor:
    """[B, M, C, G, D], with so many tokens of zeros at both ends."""
    if before or behind:
        x_BTGD = F.pad(x_BTGD, (0, 0, 0, 0, before, behind))
    return x_BTGD.unflatten(1, (-1, size))


def _neighbours(x_BTGD: Tensor, behind: int, size: int, heads: int) -> Tensor:
    """[B M, H, S, D]: each block after the one before it, for every query head."""
    x_BMCGD = _cut(x_BTGD, size, behind, size)
    x_XGSD = torch.cat([x_BMCGD[:, :-1], x_BMCGD[:, 1:]], dim=2).flatten(0, 1).transpose(1, 2)
    # One key/value head is lent to all query heads without a copy.
    return x_XGSD[:, :, None].expand(-1, -1, heads // x_XGSD.shape[1], -1, -1).flatten(1, 2)
