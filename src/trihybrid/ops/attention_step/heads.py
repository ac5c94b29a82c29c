"""What the kernels of `attention_step` share: heads of the projections, tokens of the store, a program's part of them.

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
def normed(x_RN, width, epsilon, NORMED: tl.constexpr):
    """Heads [R, N], float32, behind a norm without weights where there is one."""
    if NORMED:
        x_RN *= tl.rsqrt(tl.sum(x_RN * x_RN, 1) / width + epsilon)[:, None]
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


@triton.jit
def block_of(
    keys, values, table, batch, group, token_S, in_S, wide_1N, in_1N, keys_p, keys_l, keys_g, values_p, values_l,
    values_g, LENGTH: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Keys and values [S, N] of some tokens."""
    k_SN = stored(
        keys, table, batch, group, token_S, in_S, wide_1N, in_1N, keys_p, keys_l, keys_g, LENGTH, RING
    )
    v_SN = stored(
        values, table, batch, group, token_S, in_S, wide_1N, in_1N, values_p, values_l, values_g, LENGTH, RING
    )  # fmt: skip
    return k_SN, v_SN


@triton.jit
def part_of(positions, batch, part, parts, LENGTH: tl.constexpr, RING: tl.constexpr, BLOCK: tl.constexpr):
    """The first token of a part and the one behind its last, and the newest of all: blocks of a part, so that the
    parts are even and end at borders of blocks."""
    position = tl.load(positions + batch).to(tl.int32)
    length, newest = position + 1, position
    if RING:
        length, newest = tl.minimum(length, LENGTH), position % LENGTH
    share = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    return part * share, tl.minimum((part + 1) * share, length), newest


@triton.jit
def own_weights(weight, wide_1N, other_1N, in_1N, NORMED: tl.constexpr):
    """A norm's weights, and those of the other channel of each pair; any pair where there is no norm."""
    own_1N = (wide_1N, wide_1N)
    if NORMED:
        own_1N = (row(weight, wide_1N, in_1N), row(weight, other_1N, in_1N))
    return own_1N


@triton.jit
def place_of(table, batch, newest, store_p, store_l, LENGTH: tl.constexpr, RING: tl.constexpr):
    """Where a store has the newest token, before its group."""
    page = batch
    if not RING:
        page = tl.load(table + newest // LENGTH).to(tl.int64)
    return page * store_p + newest % LENGTH * store_l


@triton.jit
def newest_of(
    x, k_first, v_first, group, width, at_k_1N, at_v_1N, wide_1N, other_1N, in_1N, OWN: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """The newest token's key, the other channel of each of its pairs, and its value, [1, N] in float32: raw from the
    projections `x` where they are the layer's own, else as the store has them."""
    if OWN:
        k_1N = row(x + k_first + group * width, wide_1N, in_1N)
        v_1N = row(x + v_first + group * width, wide_1N, in_1N)
        k_other_1N = k_1N
        if TURNED:
            k_other_1N = row(x + k_first + group * width, other_1N, in_1N)
    else:
        k_1N = tl.load(at_k_1N, mask=in_1N, other=0.0).to(tl.float32)
        v_1N = tl.load(at_v_1N, mask=in_1N, other=0.0).to(tl.float32)
        k_other_1N = k_1N
    return k_1N, k_other_1N, v_1N
