"""The part of a chunk that does not depend on values and states, for all chunks in parallel.

With c_i = sum_{j <= i} log_w_j in the chunk, c'_i = c_{i-1}, m = c in its middle, and rows
    A~ = a e^{c' - m}   R~ = r e^{c - m}   B- = b e^{m - c}   K- = k e^{m - c}
    A^ = A~ e^m         R^ = R~ e^m        B^ = b e^{c_C - c} K^ = k e^{c_C - c}       (all factors <= 1)
    L = tril(A~ B-^T, -1)   M = tril(A~ K-^T, -1)   Q = tril(R~ B-^T)   P = tril(R~ K-^T)   F = (I - L)^{-1}
    W = F A^   N = F M   E = Q F   R* = R^ + Q W   K* = K^ + N^T B^   P* = P + Q N   g = e^{c_C}
a chunk with values V takes the state h that enters to
    o = R* h + P* V     h' = diag(g) h + B^^T (W h) + K*^T V.
The inverse is found by doubling the size of inverted diagonal blocks, F_2s = F_s + F_s (L . corner_2s) F_s: every
intermediate is a block of F, small, where the Neumann product has terms of thousands that must cancel in float16.
Scores have operands with the range of float32 (TF32 on the tensor cores), everything after them is float16.

A document that starts inside the chunk: pairs of different documents are masked, rows of A^ and R^ after the first
border are zero, so are rows of B^ and K^ before the last one, and so is g.

Legend: B batch, T time, H heads, K key width, C tokens of a chunk, N = B H chunks.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.wkv7.triton.chunks import (
    BITS,
    documents,
    exponents,
    inside,
    pairs,
    plane,
    recurrent,
    rows,
    steepest,
    strides,
    tile,
)

# A program is one warp, so that nothing waits for other warps, and takes keys in blocks, twice, to need few registers.
BLOCK_K, WARPS, STAGES = 32, 1, 4


@dataclass(frozen=True)
class Prepared:
    """W, R*, B^, K* [4, N, C, K] and P*, F, N, E = Q F [4, N, C, C] (P* alone without a gradient) in float16, and g
    [N, K] in float32, of every chunk."""

    wide_4NCK: Tensor
    square_4NCC: Tensor
    g_NK: Tensor


def prepare(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTGK: Tensor,
    a_BTGK: Tensor,
    b_BTHK: Tensor,
    reset_BT: Tensor | None,
    chunk: int,
    gradient: bool,
    grouped: bool,
) -> Prepared:
    """Prepare all chunks of `chunk` tokens; the last one is padded. The last dimensions are contiguous.

    reset_BT: uint8, contiguous, or None. gradient: whether F, N and E are wanted. grouped: whether a and b are kk and
    iclr, as in `chunks.recurrent`.
    """
    batch, length, heads, width = r_BTHK.shape
    chunks = triton.cdiv(length, chunk)
    count = batch * heads * chunks
    half = partial(torch.empty, device=r_BTHK.device, dtype=torch.float16)
    wide_4NCK = half(4, count, chunk, width)
    square_4NCC = half(4 if gradient else 1, count, chunk, chunk)
    g_NK = torch.empty(count, width, device=r_BTHK.device, dtype=torch.float32)
    _prepare[(count,)](
        r_BTHK,
        log_w_BTHK,
        k_BTGK,
        a_BTGK,
        b_BTHK,
        g_NK if reset_BT is None else reset_BT,
        wide_4NCK,
        square_4NCC,
        g_NK,
        length,
        chunks,
        heads,
        heads // k_BTGK.shape[2],
        *strides(r_BTHK),
        *strides(log_w_BTHK),
        *strides(k_BTGK),
        *strides(a_BTGK),
        *strides(b_BTHK),
        STEEPEST=steepest(chunk),
        HAS_RESET=reset_BT is not None,
        WHOLE=length % chunk == 0,
        GRADIENT=gradient,
        GROUPED=grouped,
        C=chunk,
        K=width,
        BLOCK_K=min(BLOCK_K, width),
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return Prepared(wide_4NCK, square_4NCC, g_NK)


@triton.jit
def _inverse(l_CC, C: tl.constexpr):
    """(I - L)^{-1} of a strictly lower triangular L, float16 operands, C a power of two."""
    i_C = tl.arange(0, C)
    pair_CC = i_C[:, None] // 2 == i_C[None, :] // 2
    f_CC = tl.where(i_C[:, None] == i_C[None, :], 1.0, tl.where(pair_CC, l_CC, 0.0))
    for level in tl.static_range(1, 6):
        if 2**level < C:
            part_C = i_C // 2**level
            corner_CC = (part_C[:, None] == part_C[None, :] + 1) & (part_C[None, :] % 2 == 0)
            half_CC = f_CC.to(tl.float16)
            moved_CC = tl.dot(half_CC, tl.where(corner_CC, l_CC, 0.0).to(tl.float16))
            f_CC = tl.dot(moved_CC.to(tl.float16), half_CC, f_CC)
    return f_CC.to(tl.float16)


@triton.jit
def _prepare(
    r,
    log_w,
    k,
    a,
    b,
    reset,
    wide_4NCK,
    square_4NCC,
    g_NK,
    length,
    chunks,
    heads,
    repeats,
    r_stride_b,
    r_stride_t,
    r_stride_h,
    w_stride_b,
    w_stride_t,
    w_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    a_stride_b,
    a_stride_t,
    a_stride_h,
    b_stride_b,
    b_stride_t,
    b_stride_h,
    STEEPEST: tl.constexpr,
    HAS_RESET: tl.constexpr,
    WHOLE: tl.constexpr,
    GRADIENT: tl.constexpr,
    GROUPED: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Heads run fastest: programs that run together read whole tokens.
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    rest = index // heads
    chunk, batch = rest % chunks, rest // chunks
    number = (batch * heads + head) * chunks + chunk
    start = chunk * C
    count = tl.num_programs(0).to(tl.int64)
    inside_C1 = inside(start, length, C, WHOLE)
    starts_C, document_C = documents(reset, batch, start, length, C, HAS_RESET)
    log_w = rows(log_w, w_stride_b, w_stride_t, w_stride_h, batch, head, start, C, BLOCK_K)
    r = rows(r, r_stride_b, r_stride_t, r_stride_h, batch, head, start, C, BLOCK_K)
    # Keys and unit keys may be shared by some heads.
    k = rows(k, k_stride_b, k_stride_t, k_stride_h, batch, head // repeats, start, C, BLOCK_K)
    a = rows(a, a_stride_b, a_stride_t, a_stride_h, batch, head // repeats, start, C, BLOCK_K)
    b = rows(b, b_stride_b, b_stride_t, b_stride_h, batch, head, start, C, BLOCK_K)

    l_CC = tl.zeros((C, C), tl.float32)
    m_CC = tl.zeros((C, C), tl.float32)
    q_CC = tl.zeros((C, C), tl.float32)
    p_CC = tl.zeros((C, C), tl.float32)
    for key in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        w_CK = tl.load(log_w + key, mask=inside_C1, other=0.0)
        a_CK = tl.load(a + key, mask=inside_C1, other=0.0)
        b_CK = tl.load(b + key, mask=inside_C1, other=0.0)
        k_CK = tl.load(k + key, mask=inside_C1, other=0.0)
        r_CK = tl.load(r + key, mask=inside_C1, other=0.0).to(tl.float32)
        k_CK, a_CK, b_CK = recurrent(k_CK, a_CK, b_CK, w_CK, GROUPED)
        w_CK, c_CK, middle_1K, _ = exponents(w_CK, starts_C, STEEPEST, C)
        c_CK -= middle_1K
        rise_CK = tl.exp2(-c_CK)
        a_CK *= tl.exp2(c_CK - w_CK * BITS)
        r_CK *= tl.exp2(c_CK)
        b_KC = tl.trans(b_CK * rise_CK)
        k_KC = tl.trans(k_CK * rise_CK)
        l_CC = tl.dot(a_CK, b_KC, l_CC, input_precision="tf32")
        m_CC = tl.dot(a_CK, k_KC, m_CC, input_precision="tf32")
        q_CC = tl.dot(r_CK, b_KC, q_CC, input_precision="tf32")
        p_CC = tl.dot(r_CK, k_KC, p_CC, input_precision="tf32")

    strict_CC = pairs(document_C, True, C)
    loose_CC = pairs(document_C, False, C)
    l_CC = tl.where(strict_CC, l_CC, 0.0)
    m_CC = tl.where(strict_CC, m_CC, 0.0)
    q_CC = tl.where(loose_CC, q_CC, 0.0).to(tl.float16)
    p_CC = tl.where(loose_CC, p_CC, 0.0)
    f_CC = _inverse(l_CC, C)
    n_CC = tl.dot(f_CC, m_CC.to(tl.float16)).to(tl.float16)
    tl.store(tile(square_4NCC, number, C, C, C), tl.dot(q_CC, n_CC, p_CC).to(tl.float16))
    if GRADIENT:
        tl.store(tile(plane(square_4NCC, 1, count, C * C), number, C, C, C), f_CC)
        tl.store(tile(plane(square_4NCC, 2, count, C * C), number, C, C, C), n_CC)
        tl.store(
            tile(plane(square_4NCC, 3, count, C * C), number, C, C, C), tl.dot(q_CC, f_CC).to(tl.float16)
        )

    borders = tl.sum(starts_C, 0)
    for key in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        w_CK = tl.load(log_w + key, mask=inside_C1, other=0.0)
        a_CK = tl.load(a + key, mask=inside_C1, other=0.0)
        b_CK = tl.load(b + key, mask=inside_C1, other=0.0)
        k_CK = tl.load(k + key, mask=inside_C1, other=0.0)
        r_CK = tl.load(r + key, mask=inside_C1, other=0.0).to(tl.float32)
        k_CK, a_CK, b_CK = recurrent(k_CK, a_CK, b_CK, w_CK, GROUPED)
        w_CK, c_CK, _, total_1K = exponents(w_CK, starts_C, STEEPEST, C)
        leave_CK = tl.exp2(total_1K - c_CK)
        r_CK *= tl.exp2(c_CK)
        a_CK *= tl.exp2(c_CK - w_CK * BITS)
        gate_1K = tl.exp2(total_1K)
        if HAS_RESET:
            r_CK = tl.where((document_C == 0)[:, None], r_CK, 0.0)
            a_CK = tl.where((document_C == 0)[:, None], a_CK, 0.0)
            leave_CK = tl.where((document_C == borders)[:, None], leave_CK, 0.0)
            gate_1K = tl.where(borders == 0, gate_1K, 0.0)
        w_CK = tl.dot(f_CC, a_CK.to(tl.float16)).to(tl.float16)
        tl.store(tile(wide_4NCK, number, C, K, BLOCK_K) + key, w_CK)
        b_CK = (b_CK * leave_CK).to(tl.float16)
        tl.store(tile(plane(wide_4NCK, 2, count, C * K), number, C, K, BLOCK_K) + key, b_CK)
        tl.store(
            tile(plane(wide_4NCK, 1, count, C * K), number, C, K, BLOCK_K) + key,
            tl.dot(q_CC, w_CK, r_CK).to(tl.float16),
        )
        k_CK = tl.dot(tl.trans(n_CC), b_CK, k_CK * leave_CK)
        tl.store(tile(plane(wide_4NCK, 3, count, C * K), number, C, K, BLOCK_K) + key, k_CK.to(tl.float16))
        tl.store(tile(g_NK, number, 1, K, BLOCK_K) + key, gate_1K)
