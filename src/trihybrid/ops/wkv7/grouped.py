"""WKV-7 as RWKV-7 calls it, with keys and values that groups of heads share.

Shapes: B batch, T time, H heads, G groups of H / G heads, K key width, V value width.

Repeating keys and values in memory, and writing down what is made of them, costs more bytes than the recurrence itself.
A backend that reads them once a group and makes the rest on the way takes this form; all others get its definition.
"""

import torch
from torch import Tensor

from trihybrid.ops.wkv7 import check, chosen, wkv7
from trihybrid.ops.wkv7.triton import wkv7_triton_grouped

__all__ = ["wkv7_grouped"]


def wkv7_grouped(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    kk_BTGK: Tensor,
    iclr_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    reset_BT: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`trihybrid.ops.wkv7.wkv7`, head h reading k, v and kk of group h // (H / G), with

        a = -kk    b = kk iclr    k <- k (1 - exp(log_w) + iclr)

    in float32, or float64 where v is (model card of RWKV-Gemma-4-5B-E2B-Preview-v0.1, the hxa07i revision). The key is
    scaled by exp(log_w) of every token, of one too at which a document starts.

    k_BTGK, kk_BTGK, v_BTGV: floating point; G divides H. kk: unit vectors, or zero for a token that erases nothing.
    iclr_BTHK: floating point. The other arguments, the results and the ValueErrors are those of `wkv7`.
    """
    if r_BTHK.dim() != 4 or v_BTGV.dim() != 4 or 0 in v_BTGV.shape or r_BTHK.shape[2] % v_BTGV.shape[2]:
        raise ValueError(
            f"r_BTHK has shape {tuple(r_BTHK.shape)} and v_BTGV {tuple(v_BTGV.shape)}; expected (batch, time, heads, "
            "width) and (batch, time, groups, width), where the groups divide the heads"
        )
    batch, time, heads, key_width = r_BTHK.shape
    groups, value_width = v_BTGV.shape[2:]
    shared = (batch, time, groups, key_width)
    check(
        v_BTGV,
        reset_BT,
        r_BTHK=(r_BTHK, r_BTHK.shape),
        log_w_BTHK=(log_w_BTHK, r_BTHK.shape),
        k_BTGK=(k_BTGK, shared),
        v_BTGV=(v_BTGV, (*shared[:3], value_width)),
        kk_BTGK=(kk_BTGK, shared),
        iclr_BTHK=(iclr_BTHK, r_BTHK.shape),
        state_BHKV=(state_BHKV, (batch, heads, key_width, value_width)),
    )
    name = chosen(backend, v_BTGV.device.type, key_width, value_width, v_BTGV.dtype)
    if name == "triton":
        tokens = (r_BTHK, log_w_BTHK, k_BTGK, v_BTGV, kk_BTGK, iclr_BTHK)
        return wkv7_triton_grouped(*tokens, state_BHKV, reset_BT)
    wide = torch.float64 if v_BTGV.dtype == torch.float64 else torch.float32
    k_BTHK, v_BTHV, kk_BTHK = (
        x.repeat_interleave(heads // groups, 2) for x in (k_BTGK.to(wide), v_BTGV, kk_BTGK.to(wide))
    )
    k_BTHK = k_BTHK * (1 - log_w_BTHK.to(wide).exp() + iclr_BTHK)
    a_BTHK, b_BTHK = -kk_BTHK, kk_BTHK * iclr_BTHK
    return wkv7(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state_BHKV, reset_BT, name)
