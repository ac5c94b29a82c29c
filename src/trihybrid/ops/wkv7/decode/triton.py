"""The kernel of `wkv7_step`: a program holds a block of value columns of one head's state, which never meet the others.

Legend: K keys, V values of a block; WIDTH_K and WIDTH_V are those of a head, BLOCK_K is WIDTH_K rounded up to a power
of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Value columns and warps of a program: a narrow block where there are few heads, so that every processor gets some.
NARROW, WIDE = (16, 4), (32, 4)
FEW_HEADS = 128  # of the whole batch


def launch(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    state_BHKV: Tensor,
    after_BHKV: Tensor,
    reset_B1: Tensor | None,
) -> Tensor:
    """o [B, 1, H, V] in v's dtype; the new state is written to `after_BHKV`, which may be `state_BHKV` itself.

    tokens: r, log_w, k, v, a, b, each [B, 1, H, K or V]. States float32 and dense in [K, V].
    """
    dense = [x if x.stride(3) == 1 else x.contiguous() for x in tokens]
    v_B1HV = dense[3]
    batch, heads, key_width, value_width = state_BHKV.shape
    o_B1HV = torch.empty(v_B1HV.shape, dtype=v_B1HV.dtype, device=v_B1HV.device)
    block_v, warps = NARROW if batch * heads < FEW_HEADS else WIDE
    block_v = min(block_v, triton.next_power_of_2(value_width))
    blocks = triton.cdiv(value_width, block_v)
    if o_B1HV.numel():
        _step[(batch * heads * blocks,)](
            *dense,
            state_BHKV,
            after_BHKV,
            o_B1HV if reset_B1 is None else reset_B1,
            o_B1HV,
            *(stride for x in dense for stride in (x.stride(0), x.stride(2))),
            *state_BHKV.stride()[:2],
            *after_BHKV.stride()[:2],
            0 if reset_B1 is None else reset_B1.stride(0),
            heads,
            blocks,
            RESETS=reset_B1 is not None,
            WIDTH_K=key_width,
            WIDTH_V=value_width,
            BLOCK_K=triton.next_power_of_2(key_width),
            BLOCK_V=block_v,
            num_warps=warps,
        )
    return o_B1HV


@triton.jit
def _row(base, batch, head, stride_b, stride_h, wide, mask):
    """One token's row of one head, float32; zeros outside of the mask."""
    at = base + batch * stride_b + head * stride_h + wide
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _step(
    r, log_w, k, v, a, b, state, after, reset, o, r_b, r_h, log_w_b, log_w_h, k_b, k_h, v_b, v_h, a_b, a_h, b_b, b_h,
    state_b, state_h, after_b, after_h, reset_b, heads, blocks, RESETS: tl.constexpr, WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) // blocks
    batch, head = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    wide_K = tl.arange(0, BLOCK_K)
    wide_V = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_K, in_V = wide_K < WIDTH_K, wide_V < WIDTH_V
    at_KV = wide_K[:, None] * WIDTH_V + wide_V[None, :]
    in_KV = in_K[:, None] & in_V[None, :]
    # Neither the state nor the decay counts at the first token of a document, not even where they are not finite.
    old_K, old_KV = in_K, in_KV
    if RESETS:
        goes_on = tl.load(reset + batch * reset_b) == 0
        old_K, old_KV = in_K & goes_on, in_KV & goes_on
    s_KV = tl.load(state + batch * state_b + head * state_h + at_KV, mask=old_KV, other=0.0)
    a_K = _row(a, batch, head, a_b, a_h, wide_K, in_K)
    w_K = tl.exp(_row(log_w, batch, head, log_w_b, log_w_h, wide_K, old_K))
    b_K = _row(b, batch, head, b_b, b_h, wide_K, in_K)
    k_K = _row(k, batch, head, k_b, k_h, wide_K, in_K)
    r_K = _row(r, batch, head, r_b, r_h, wide_K, in_K)
    v_V = _row(v, batch, head, v_b, v_h, wide_V, in_V)
    u_V = tl.sum(a_K[:, None] * s_KV, 0)
    s_KV = w_K[:, None] * s_KV + b_K[:, None] * u_V[None, :] + k_K[:, None] * v_V[None, :]
    tl.store(after + batch * after_b + head * after_h + at_KV, s_KV, mask=in_KV)
    o_V = tl.sum(r_K[:, None] * s_KV, 0)
    tl.store(o + lane.to(tl.int64) * WIDTH_V + wide_V, o_V.to(o.dtype.element_ty), mask=in_V)
