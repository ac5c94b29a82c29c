"""Gradients that are sums over values, for all groups of chunks and blocks of keys in parallel.

With the letters of `prepare` and `state`, U and Z being the true ones, for every chunk
    dO h^T    Z h^T    Z U^T    Z V^T    dO U^T    dO V^T       and, with dH' the gradient of the state that leaves,
    V dH'^T   U dH'^T.
Neither h nor dH' was kept for every chunk. A group's first h is there, and walks forwards through the group once more,
h' = diag(g) h + K*^T V + B^^T U; so is its last dH', which walks backwards, dH = diag(g) dH' + R*^T dO + W^T Z, with U
and Z as the chain had them. Since these are known, rows of keys never meet, and a state is held as [K, V], ready to be
the left operand.
At the end of each group e = rowsum_V(dH' . h'), where the sums that lead to the gradient of log_w start.

Legend: B batch, T time, H heads, K key width, V value width, C tokens of a chunk, N = B H chunks, G = B H groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.wkv7.triton.chunks import plane, rows, strides, tile
from trihybrid.ops.wkv7.triton.prepare import Prepared
from trihybrid.ops.wkv7.triton.state import GROUP, power

BLOCK_K, STAGES = 64, 3
KEYS_A_WARP = 16


def sum_values(
    ready: Prepared,
    v_BTGV: Tensor,
    do_BTHV: Tensor,
    u_NVC: Tensor,
    z_NVC: Tensor,
    true_u_NVC: Tensor,
    true_z_NVC: Tensor,
    kept_GVK: Tensor,
    dkept_GVK: Tensor,
    largest_BH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dO h^T, Z h^T, V dH'^T, U dH'^T [4, N, C, K] and Z U^T, Z V^T, dO U^T, dO V^T [4, N, C, C] (all their entries) in
    float16, e [B H, groups, K] in float32; all times the scale."""
    count, chunk, keys = ready.wide_4NCK.shape[1:]
    lanes, borders = kept_GVK.shape[:2]
    sums_4NCK, scores_4NCC = torch.empty_like(ready.wide_4NCK), torch.empty_like(ready.square_4NCC)
    e_GK = torch.empty(lanes, borders - 1, keys, device=v_BTGV.device, dtype=torch.float32)
    _, length, heads, width = do_BTHV.shape
    block = min(BLOCK_K, keys)
    for reverse, states_GVK, x, other, values in (
        (False, kept_GVK, do_BTHV, v_BTGV, (true_z_NVC, u_NVC)),
        (True, dkept_GVK, v_BTGV, do_BTHV, (true_u_NVC, z_NVC)),
    ):
        _sum[(lanes * (borders - 1) * (keys // block),)](
            states_GVK,
            kept_GVK,
            x,
            other,
            ready.wide_4NCK,
            *values,
            ready.g_NK,
            largest_BH,
            sums_4NCK,
            e_GK,
            length,
            triton.cdiv(length, chunk),
            heads,
            heads // x.shape[2],
            *strides(x),
            heads // other.shape[2],
            *strides(other),
            REVERSE=reverse,
            GROUP_CHUNKS=GROUP // chunk,
            C=chunk,
            K=keys,
            V=width,
            BLOCK_K=block,
            STAGES=STAGES,
            num_warps=block // KEYS_A_WARP,
        )
    _score[(count,)](
        true_u_NVC,
        true_z_NVC,
        v_BTGV,
        do_BTHV,
        largest_BH,
        scores_4NCC,
        length,
        triton.cdiv(length, chunk),
        heads,
        heads // v_BTGV.shape[2],
        *strides(v_BTGV),
        *strides(do_BTHV),
        C=chunk,
        V=width,
        num_warps=1,
    )
    return sums_4NCK, scores_4NCC, e_GK


@triton.jit
def _values(
    x,
    stride_b,
    stride_t,
    stride_h,
    batch,
    head,
    start,
    length,
    scale,
    SCALED: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
):
    """Rows of V, or of dO times the scale, in float16."""
    at = rows(x, stride_b, stride_t, stride_h, batch, head, start, C, V)
    x_CV = tl.load(at, mask=(start + tl.arange(0, C) < length)[:, None], other=0.0)
    if SCALED:
        x_CV = x_CV.to(tl.float32) * scale
    return x_CV.to(tl.float16)


@triton.jit
def _score(
    u_NVC,
    z_NVC,
    v,
    do,
    largest,
    scores_4NCC,
    length,
    chunks,
    heads,
    repeats,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    do_stride_b,
    do_stride_t,
    do_stride_h,
    C: tl.constexpr,
    V: tl.constexpr,
):
    # Heads run fastest, as in `prepare`.
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    rest = index // heads
    chunk, batch = rest % chunks, rest // chunks
    number = (batch * heads + head) * chunks + chunk
    start = chunk * C
    count = tl.num_programs(0).to(tl.int64)
    scale = power(tl.load(largest + batch * heads + head))
    z_VC = tl.load(tile(z_NVC, number, V, C, C))
    u_VC = tl.load(tile(u_NVC, number, V, C, C))
    v_CV = _values(
        v, v_stride_b, v_stride_t, v_stride_h, batch, head // repeats, start, length, scale, False, C, V
    )
    o_CV = _values(do, do_stride_b, do_stride_t, do_stride_h, batch, head, start, length, scale, True, C, V)
    z_CV, v_VC = tl.trans(z_VC), tl.trans(v_CV)
    tl.store(tile(scores_4NCC, number, C, C, C), tl.dot(z_CV, u_VC).to(tl.float16))
    tl.store(tile(plane(scores_4NCC, 1, count, C * C), number, C, C, C), tl.dot(z_CV, v_VC).to(tl.float16))
    tl.store(tile(plane(scores_4NCC, 2, count, C * C), number, C, C, C), tl.dot(o_CV, u_VC).to(tl.float16))
    tl.store(tile(plane(scores_4NCC, 3, count, C * C), number, C, C, C), tl.dot(o_CV, v_VC).to(tl.float16))


@triton.jit
def _sum(
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
    index = (tl.program_id(0) // blocks).to(tl.int64)
    head = index % heads
    rest = index // heads
    group, batch = rest % groups, rest // groups
    lane = batch * heads + head
    block = tl.program_id(0) % blocks
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
    every = (tl.num_programs(0) // (groups * blocks)).to(tl.int64) * chunks
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
