"""What the kernels of `attention_step` share: heads of the projections, and tokens of the store.

Legend: R heads, N head width, S tokens.
"""

import triton
import triton.language as tl


@triton.jit
def placed(
    x_RN, other_RN, own_1N, cosine_1N, sine_1N, width, epsilon, NORMED: tl.constexpr, TURNED: tl.constexpr
):
    """Heads [R, N], float32, behind their norm and rotation; pair j is channels j and j + N/2.

    `other_RN` has the other channel of each pair, and `own_1N` the norm's weights of both.
    """
    weight_1N, other_weight_1N = own_1N
    if NORMED:
        root_R1 = tl.rsqrt(tl.sum(x_RN * x_RN, 1) / width + epsilon)[:, None]
        x_RN *= root_R1 * weight_1N
        if TURNED:
            other_RN *= root_R1 * other_weight_1N
    if TURNED:
        x_RN = x_RN * cosine_1N + other_RN * sine_1N
    return x_RN


@triton.jit
def row(start, wide_1N, in_1N):
    """[1, N] of a vector, float32."""
    return tl.load(start + wide_1N, mask=in_1N, other=0.0).to(tl.float32)


@triton.jit
def stored(
    store, table, batch, group, token_S, in_S, wide_1N, in_1N, store_p, store_l, store_g, LENGTH: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """Keys or values [S, N] of some tokens."""
    page_S = token_S.to(tl.int64) * 0 + batch
    if not RING:
        page_S = tl.load(table + token_S // LENGTH, mask=in_S, other=0).to(tl.int64)
    at_S = page_S * store_p + (token_S % LENGTH) * store_l + group * store_g
    return tl.load(store + at_S[:, None] + wide_1N, mask=in_S[:, None] & in_1N, other=0.0)
