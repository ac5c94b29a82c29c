"""The kernel of `recurrence_step`: a program holds a block of value columns of a head's state, which never meet others.

The state is fetched before the former kernel has ended: nothing else in a step touches it, and a step does not begin
early.

Legend: K keys, V values of a block; WIDE is the head width rounded up to a power of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.early import admit_next, await_former, early
from trihybrid.ops.rates import DECAY_FLOOR
from trihybrid.ops.recurrence_step import Recurrence

# Value columns and warps of a program: a narrow block where there are few heads, so that every processor gets some.
NARROW, BROAD = (16, 4), (32, 4)
FEW_HEADS = 128  # of the whole batch
FLOOR = tl.constexpr(DECAY_FLOOR)


def launch(x_BP: Tensor, raised_BP: Tensor, recurrence: Recurrence, state_BHNN: Tensor, o_BC: Tensor) -> None:
    """As `recurrence_step`."""
    batch, heads, width = state_BHNN.shape[:3]
    block, warps = NARROW if batch * heads < FEW_HEADS else BROAD
    block = min(block, triton.next_power_of_2(width))
    blocks, soon = triton.cdiv(width, block), early(x_BP.device)
    r_gain, k_gain, bonus = recurrence.r_gain, recurrence.k_gain, recurrence.bonus
    # What is not there is never read; something has to stand in its place.
    _step[(batch * heads * blocks,)](
        x_BP, raised_BP, recurrence.w0, recurrence.a0,
        *(x_BP if gain is None else gain.weight for gain in (r_gain, k_gain)), x_BP if bonus is None else bonus,
        state_BHNN, o_BC, x_BP.stride(0), raised_BP.stride(0), state_BHNN.stride(0), o_BC.stride(0), heads,
        recurrence.groups, width, blocks, 0.0 if r_gain is None else r_gain.epsilon,
        0.0 if k_gain is None else k_gain.epsilon, width**-0.5,
        NORMED=r_gain is not None, BY_DECAY=recurrence.by_decay, BONUS=bonus is not None,
        WIDE=triton.next_power_of_2(width), BLOCK=block, EARLY=soon, num_warps=warps, launch_pdl=soon,
    )  # fmt: skip


@triton.jit
def _step(
    x, raised, w0, a0, r_weight, k_weight, bonus, state, o, x_b, raised_b, state_b, o_b, heads, groups, width, blocks,
    r_epsilon, k_epsilon, scale, NORMED: tl.constexpr, BY_DECAY: tl.constexpr, BONUS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) // blocks
    batch, head = (lane // heads).to(tl.int64), lane % heads
    wide_K = tl.arange(0, WIDE)
    wide_V = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    in_K, in_V = wide_K < width, wide_V < width
    channels = heads * width
    group, own_K = head // (heads // groups), head * width + wide_K
    state_KV = state + batch * state_b + head * width * width + wide_K[:, None] * width + wide_V[None, :]
    in_KV = in_K[:, None] & in_V[None, :]
    s_KV = tl.load(state_KV, mask=in_KV, other=0.0)
    u_K = tl.load(w0 + own_K, mask=in_K, other=0.0).to(tl.float32)
    a_K = tl.load(a0 + own_K, mask=in_K, other=0.0).to(tl.float32)
    if NORMED:
        r_weight_K = tl.load(r_weight + wide_K, mask=in_K, other=0.0).to(tl.float32)
        k_weight_K = tl.load(k_weight + wide_K, mask=in_K, other=0.0).to(tl.float32)
    if BONUS:
        bonus_K = tl.load(bonus + own_K, mask=in_K, other=0.0).to(tl.float32)
    admit_next(EARLY)
    await_former(EARLY)
    x += batch * x_b
    raised += batch * raised_b
    r_K = tl.load(x + own_K, mask=in_K, other=0.0).to(tl.float32)
    keys = x + channels + group * width
    k_K = tl.load(keys + wide_K, mask=in_K, other=0.0).to(tl.float32)
    v_V = tl.load(keys + groups * width + wide_V, mask=in_V, other=0.0).to(tl.float32)
    u_K += tl.load(raised + channels + own_K, mask=in_K, other=0.0).to(tl.float32)
    a_K = tl.sigmoid(a_K + tl.load(raised + own_K, mask=in_K, other=0.0).to(tl.float32))
    gate_V = tl.load(raised + 2 * channels + head * width + wide_V, mask=in_V, other=0.0).to(tl.float32)
    if NORMED:
        r_K *= tl.rsqrt(tl.sum(r_K * r_K, 0) / width + r_epsilon) * r_weight_K
        k_K *= tl.rsqrt(tl.sum(k_K * k_K, 0) / width + k_epsilon) * k_weight_K
    kk_K = k_K / (tl.sqrt(tl.sum(k_K * k_K, 0)) + 1e-12)
    share_K = tl.sigmoid(u_K)
    w_K = tl.exp(FLOOR * share_K)
    if BY_DECAY:
        k_K *= 1 - w_K + a_K
    else:
        # log sigmoid(u) = min(u, 0) - log(1 + exp(-|u|))
        k_K *= 1.5 - tl.minimum(u_K, 0.0) + tl.log(1 + tl.exp(-tl.abs(u_K))) + a_K
    u_V = tl.sum(kk_K[:, None] * s_KV, 0)
    s_KV = w_K[:, None] * s_KV - (kk_K * a_K)[:, None] * u_V[None, :] + k_K[:, None] * v_V[None, :]
    tl.store(state_KV, s_KV, mask=in_KV)
    o_V = tl.sum(r_K[:, None] * s_KV, 0) * scale
    if BONUS:
        o_V += tl.sum(r_K * k_K * bonus_K, 0) * v_V
    tl.store(o + batch * o_b + head * width + wide_V, (o_V * gate_V).to(o.dtype.element_ty), mask=in_V)
