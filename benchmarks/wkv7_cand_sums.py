import torch
import triton
import triton.language as tl

from trihybrid.ops.wkv7.triton.chunks import plane, strides, tile
from trihybrid.ops.wkv7.triton.state import GROUP, power
from trihybrid.ops.wkv7.triton.sums import _values


@triton.jit
def _sum_at(
    place,
    programs,
    states,
    kept,
    x,
    other,
    wide_4NCK,
    along_NVC,
    beside_NVC,
    g_NK,
    largest,
    sums_4NCK,
    e_GK,
    length,
    chunks,
    heads,
    x_repeats,
    x_stride_b,
    x_stride_t,
    x_stride_h,
    other_repeats,
    other_stride_b,
    other_stride_t,
    other_stride_h,
    REVERSE: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    groups = tl.cdiv(chunks, GROUP_CHUNKS)
    # Blocks of keys run together, since they read the same values, and then heads: they share tokens.
    blocks: tl.constexpr = K // BLOCK_K
    index = (place // blocks).to(tl.int64)
    head = index % heads
    rest = index // heads
    group, batch = rest % groups, rest // groups
    lane = batch * heads + head
    block = place % blocks
    scale = power(tl.load(largest + lane))
    key_K = block * BLOCK_K + tl.arange(0, BLOCK_K)
    # The state that enters the group, or the gradient of the one that leaves it.
    at_KV = (lane * (groups + 1) + group + (1 if REVERSE else 0)) * (K * V)
    at_KV += tl.arange(0, V)[None, :] * K + key_K[:, None]
    h_KV = tl.load(states + at_KV).to(tl.float32)
    if REVERSE:
        e_K = tl.sum(h_KV * tl.load(kept + at_KV).to(tl.float32), 1)
        tl.store(e_GK + (lane * groups + group) * K + key_K, e_K)
    # Forwards the state is written to by K* and B^, and its products are the first two; backwards, by R* and W.
    every = (programs // (groups * blocks)).to(tl.int64) * chunks
    write_NCK = plane(wide_4NCK, 1 if REVERSE else 3, every, C * K)
    back_NCK = plane(wide_4NCK, 0 if REVERSE else 2, every, C * K)
    dread_NCK = plane(sums_4NCK, 2 if REVERSE else 0, every, C * K)
    dacross_NCK = plane(sums_4NCK, 3 if REVERSE else 1, every, C * K)
    first = (group * GROUP_CHUNKS).to(tl.int32)
    count = tl.minimum(GROUP_CHUNKS, chunks - first)
    for step in tl.range(0, count, num_stages=STAGES):
        chunk = first + (count - 1 - step if REVERSE else step)
        number = lane * chunks + chunk
        start = chunk.to(tl.int64) * C
        x_CV = _values(
            x,
            x_stride_b,
            x_stride_t,
            x_stride_h,
            batch,
            head // x_repeats,
            start,
            length,
            scale,
            not REVERSE,
            C,
            V,
        )
        other_CV = _values(
            other,
            other_stride_b,
            other_stride_t,
            other_stride_h,
            batch,
            head // other_repeats,
            start,
            length,
            scale,
            REVERSE,
            C,
            V,
        )
        gate_K = tl.load(g_NK + number * K + key_K)
        along_VC = tl.load(tile(along_NVC, number, V, C, C))
        beside_VC = tl.load(tile(beside_NVC, number, V, C, C))
        at_CK = number * (C * K) + tl.arange(0, C)[:, None] * K + key_K[None, :]
        write_CK = tl.load(write_NCK + at_CK)
        back_CK = tl.load(back_NCK + at_CK)
        half_KV = h_KV.to(tl.float16)
        dread_KC = tl.dot(half_KV, tl.trans(x_CV))
        dacross_KC = tl.dot(half_KV, along_VC)
        h_KV = tl.dot(tl.trans(write_CK), other_CV, h_KV * gate_K[:, None])
        h_KV = tl.dot(tl.trans(back_CK), tl.trans(beside_VC), h_KV)
        tl.store(dread_NCK + at_CK, tl.trans(dread_KC).to(tl.float16))
        tl.store(dacross_NCK + at_CK, tl.trans(dacross_KC).to(tl.float16))


@triton.jit
def _sums(
    kept,
    dkept,
    do,
    v,
    wide_4NCK,
    u_NVC,
    z_NVC,
    true_u_NVC,
    true_z_NVC,
    g_NK,
    largest,
    sums_4NCK,
    e_GK,
    length,
    chunks,
    heads,
    do_stride_b,
    do_stride_t,
    do_stride_h,
    repeats,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    GROUP_CHUNKS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    place, programs = tl.program_id(0) // 2, tl.num_programs(0) // 2
    if tl.program_id(0) % 2 == 0:
        _sum_at(
            place,
            programs,
            kept,
            kept,
            do,
            v,
            wide_4NCK,
            true_z_NVC,
            u_NVC,
            g_NK,
            largest,
            sums_4NCK,
            e_GK,
            length,
            chunks,
            heads,
            1,
            do_stride_b,
            do_stride_t,
            do_stride_h,
            repeats,
            v_stride_b,
            v_stride_t,
            v_stride_h,
            False,
            GROUP_CHUNKS,
            C,
            K,
            V,
            BLOCK_K,
            STAGES,
        )
    else:
        _sum_at(
            place,
            programs,
            dkept,
            kept,
            v,
            do,
            wide_4NCK,
            true_u_NVC,
            z_NVC,
            g_NK,
            largest,
            sums_4NCK,
            e_GK,
            length,
            chunks,
            heads,
            repeats,
            v_stride_b,
            v_stride_t,
            v_stride_h,
            1,
            do_stride_b,
            do_stride_t,
            do_stride_h,
            True,
            GROUP_CHUNKS,
            C,
            K,
            V,
            BLOCK_K,
            STAGES,
        )


def together(ready, v, do, u, z, true_u, true_z, kept, dkept, largest):
    from trihybrid.ops.wkv7.triton import sums

    count, chunk, keys = ready.wide_4NCK.shape[1:]
    lanes, borders = kept.shape[:2]
    sums_4NCK, scores_4NCC = torch.empty_like(ready.wide_4NCK), torch.empty_like(ready.square_4NCC)
    e_GK = torch.empty(lanes, borders - 1, keys, device=v.device, dtype=torch.float32)
    _, length, heads, width = do.shape
    block = min(sums.BLOCK_K, keys)
    _sums[(2 * lanes * (borders - 1) * (keys // block),)](
        kept,
        dkept,
        do,
        v,
        ready.wide_4NCK,
        u,
        z,
        true_u,
        true_z,
        ready.g_NK,
        largest,
        sums_4NCK,
        e_GK,
        length,
        triton.cdiv(length, chunk),
        heads,
        *strides(do),
        heads // v.shape[2],
        *strides(v),
        GROUP_CHUNKS=GROUP // chunk,
        C=chunk,
        K=keys,
        V=width,
        BLOCK_K=block,
        STAGES=sums.STAGES,
        num_warps=block // sums.KEYS_A_WARP,
    )
    sums._score[(count,)](
        true_u,
        true_z,
        v,
        do,
        largest,
        scores_4NCC,
        length,
        triton.cdiv(length, chunk),
        heads,
        heads // v.shape[2],
        *strides(v),
        *strides(do),
        C=chunk,
        V=width,
        num_warps=1,
    )
    return sums_4NCK, scores_4NCC, e_GK
