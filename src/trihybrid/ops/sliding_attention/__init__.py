"""Sliding-window attention of whole rows over themselves, forwards and backwards in O(T window), for every head width.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s    over the s <= t of t's document with t - s < window

Backends: `dense`, the definition with a mask of T x T; `blocked`, a block of queries over two blocks of keys, exact on
every device and in every dtype; `flash`, torch's FlashAttention with a window, in half precision on a GPU. (The kernels
of `ops/window_attention`, for heads of at most 128, serve the compact models.) `benchmarks/sliding_gradient.py` prints
time, memory and error of each.

Legend: B batch, T time, H query heads, G key/value heads, D head width.
"""

import torch
from torch import Tensor

from trihybrid.ops.backend import Backend, choose_for, register
from trihybrid.ops.sliding_attention.blocked import blocked
from trihybrid.ops.sliding_attention.dense import dense
from trihybrid.ops.sliding_attention.documents import Documents
from trihybrid.ops.sliding_attention.flash import flash, no_flash, takes_flash

__all__ = ["OPERATOR", "Documents", "sliding_attention"]

OPERATOR = "sliding_attention"


def sliding_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    documents: Documents,
    window: int,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """[B, T, H, D] in the queries' dtype.

    Args:
        q_BTHD, k_BTGD, v_BTGD: queries [B, T, H, D], keys and values [B, T, G, D]; head h reads h // (H / G).
        documents: where the documents of each row begin; a query sees its own only.
        window: how many tokens a query reads, itself included, at least 1.
        scale: factor on the scores.
        backend: one by name, or None for the fastest that can do this.

    Raises:
        ValueError: shapes that do not go together, a window below 1, a backend that is unknown or cannot do this.
    """
    batch, length, heads, width = q_BTHD.shape
    groups = k_BTGD.shape[2]
    wanted = (batch, length, groups, width)
    if k_BTGD.shape != wanted or v_BTGD.shape != wanted or heads % groups:
        raise ValueError(
            f"sliding_attention: queries are {list(q_BTHD.shape)}, keys {list(k_BTGD.shape)} and values "
            f"{list(v_BTGD.shape)}; keys and values must be [B, T, G, D] of the same tokens, with G a divisor of H"
        )
    if documents.positions_BT.shape != (batch, length):
        raise ValueError(
            f"sliding_attention: positions are {list(documents.positions_BT.shape)}, one is needed for each of the "
            f"{[batch, length]} tokens"
        )
    if window < 1:
        raise ValueError(
            f"sliding_attention: window is {window}; a query reads itself at least, so give 1 or more"
        )
    chosen = choose_for(OPERATOR, backend, q_BTHD.device, width, q_BTHD.dtype)
    return chosen.function(q_BTHD, k_BTGD, v_BTGD, documents, window, scale)


def _always(device: torch.device) -> None:
    return None


register(Backend(OPERATOR, "dense", dense, _always, 0))
register(Backend(OPERATOR, "blocked", blocked, _always, 10))
register(Backend(OPERATOR, "flash", flash, no_flash, 20, takes_flash))
