"""The last part of the backward, without values: from sums over values to the gradients of r, log_w, k, a and b.

With u_t = S_{t-1}^T a_t and z_t = dS_t^T b_t known for every token, no two keys meet. In a chunk, with the letters of
`prepare` and `sums`, Z h^T, dO h^T, U dH'^T and V dH'^T being given and G the scores below the diagonal,
    G_ZU = tril(Z U^T, -1)    G_ZV = tril(Z V^T, -1)    G_OU = tril(dO U^T)    G_OV = tril(dO V^T)
    dA~ = G_ZU B- + G_ZV K- + e^m Z h^T             da = dA~ e^{c' - m}
    dR~ = G_OU B- + G_OV K- + e^m dO h^T            dr = dR~ e^{c - m}
    dB- = G_ZU^T A~ + G_OU^T R~ + e^{c_C - m} U dH'^T          db = dB- e^{m - c}
    dK- = G_ZV^T A~ + G_OV^T R~ + e^{c_C - m} V dH'^T          dk = dK- e^{m - c}
    dlog_w_t = e + sum_{i >= t} (r dr - k dk - b db)_i + sum_{i > t} (a da)_i
where e = rowsum_V(dH' . h') at the end of the group, and the sums run to that end.

Legend: B batch, T time, H heads, K key width, C tokens of a chunk, N = B H chunks, G = B H groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wkv7_old.chunks import (
    BITS,
    documents,
    exponents,
    inside,
    pairs,
    rows,
    running,
    steepest,
    strides,
    tile,
)
from wkv7_old.state import GROUP, power

BLOCK_K, WARPS, STAGES = 32, 1, 1  # one warp for the reason given in `prepare`


def differentiate(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    reset_BT: Tensor | None,
    scores_4NCC: Tensor,
    sums: tuple[Tensor, ...],
    e_GK: Tensor,
    largest_BH: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of r, log_w, k, a, b, each contiguous and in the dtype of its input.

    inputs: r, log_w, k, a, b [B, T, H, K]; reset_BT: uint8 or None; the rest is what `sums.sum_values` returns.
    """
    r_BTHK = inputs[0]
    batch, length, heads, keys = r_BTHK.shape
    chunk = scores_4NCC.shape[2]
    outputs = tuple(torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in inputs)
    groups = triton.cdiv(length, GROUP)
    block = min(BLOCK_K, keys)
    _differentiate[(batch * heads * groups * (keys // block),)](
        *inputs,
        r_BTHK if reset_BT is None else reset_BT,
        *scores_4NCC,
        *sums,
        e_GK,
        largest_BH,
        *outputs,
        length,
        triton.cdiv(length, chunk),
        heads,
        *(stride for x in inputs for stride in strides(x)),
        STEEPEST=steepest(chunk),
        HAS_RESET=reset_BT is not None,
        WHOLE=length % chunk == 0,
        GROUP_CHUNKS=GROUP // chunk,
        C=chunk,
        K=keys,
        BLOCK_K=block,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return outputs


@triton.jit
def _differentiate(
    r,
    log_w,
    k,
    a,
    b,
    reset,
    zu_NCC,
    zv_NCC,
    ou_NCC,
    ov_NCC,
    dr_NCK,
    da_NCK,
    dk_NCK,
    db_NCK,
    e_GK,
    largest,
    dr,
    dlog_w,
    dk,
    da,
    db,
    length,
    chunks,
    heads,
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
    GROUP_CHUNKS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    groups = tl.cdiv(chunks, GROUP_CHUNKS)
    # Blocks of keys run together, and then heads: they share tokens.
    blocks: tl.constexpr = K // BLOCK_K
    key = tl.program_id(0) % blocks * BLOCK_K
    index = (tl.program_id(0) // blocks).to(tl.int64)
    head = index % heads
    rest = index // heads
    group, batch = rest % groups, rest // groups
    lane = batch * heads + head
    back = 1.0 / power(tl.load(largest + lane))
    e_1K = back * tl.load(e_GK + (lane * groups + group) * K + key + tl.arange(0, BLOCK_K))[None, :]
    first = (group * GROUP_CHUNKS).to(tl.int32)
    count = tl.minimum(GROUP_CHUNKS, chunks - first)
    # Nothing is moved out of the loop: registers are few.
    for step in tl.range(0, count, disable_licm=True):
        chunk = first + count - 1 - step
        number = lane * chunks + chunk
        start = chunk.to(tl.int64) * C
        inside_C1 = inside(start, length, C, WHOLE)
        starts_C, document_C = documents(reset, batch, start, length, C, HAS_RESET)
        at_w = rows(log_w + key, w_stride_b, w_stride_t, w_stride_h, batch, head, start, C, BLOCK_K)
        at_r = rows(r + key, r_stride_b, r_stride_t, r_stride_h, batch, head, start, C, BLOCK_K)
        at_k = rows(k + key, k_stride_b, k_stride_t, k_stride_h, batch, head, start, C, BLOCK_K)
        at_a = rows(a + key, a_stride_b, a_stride_t, a_stride_h, batch, head, start, C, BLOCK_K)
        at_b = rows(b + key, b_stride_b, b_stride_t, b_stride_h, batch, head, start, C, BLOCK_K)
        w_CK, c_CK, middle_1K, total_1K = exponents(at_w, starts_C, inside_C1, STEEPEST, C)
        c_CK -= middle_1K
        enter_CK = tl.exp2(middle_1K) * back
        leave_CK = tl.exp2(total_1K - middle_1K) * back
        if HAS_RESET:
            enter_CK = tl.where((document_C == 0)[:, None], enter_CK, 0.0)
            leave_CK = tl.where((document_C == tl.sum(starts_C, 0))[:, None], leave_CK, 0.0)
        grow_CK = tl.exp2(c_CK - w_CK * BITS)
        fall_CK = tl.exp2(c_CK)
        rise_CK = tl.exp2(-c_CK)
        a_CK = tl.load(at_a, mask=inside_C1, other=0.0).to(tl.float32) * grow_CK
        r_CK = tl.load(at_r, mask=inside_C1, other=0.0).to(tl.float32) * fall_CK
        b_CK = tl.load(at_b, mask=inside_C1, other=0.0).to(tl.float32) * rise_CK
        k_CK = tl.load(at_k, mask=inside_C1, other=0.0).to(tl.float32) * rise_CK
        strict_CC = pairs(document_C, True, C)
        loose_CC = pairs(document_C, False, C)
        zu_CC = tl.where(strict_CC, tl.load(tile(zu_NCC, number, C, C, C)).to(tl.float32) * back, 0.0)
        zv_CC = tl.where(strict_CC, tl.load(tile(zv_NCC, number, C, C, C)).to(tl.float32) * back, 0.0)
        ou_CC = tl.where(loose_CC, tl.load(tile(ou_NCC, number, C, C, C)).to(tl.float32) * back, 0.0)
        ov_CC = tl.where(loose_CC, tl.load(tile(ov_NCC, number, C, C, C)).to(tl.float32) * back, 0.0)
        at_out = ((batch * length + start) * heads + head) * K + key
        at_out += tl.arange(0, C)[:, None] * (heads * K) + tl.arange(0, BLOCK_K)[None, :]

        da_CK = tl.load(tile(da_NCK, number, C, K, BLOCK_K) + key).to(tl.float32) * enter_CK
        da_CK = tl.dot(zu_CC, b_CK, da_CK, input_precision="tf32")
        da_CK = tl.dot(zv_CC, k_CK, da_CK, input_precision="tf32")
        tl.store(da + at_out, (da_CK * grow_CK).to(da.dtype.element_ty), mask=inside_C1)
        da_CK *= a_CK

        dr_CK = tl.load(tile(dr_NCK, number, C, K, BLOCK_K) + key).to(tl.float32) * enter_CK
        dr_CK = tl.dot(ou_CC, b_CK, dr_CK, input_precision="tf32")
        dr_CK = tl.dot(ov_CC, k_CK, dr_CK, input_precision="tf32")
        tl.store(dr + at_out, (dr_CK * fall_CK).to(dr.dtype.element_ty), mask=inside_C1)
        moved_CK = da_CK + r_CK * dr_CK

        db_CK = tl.load(tile(db_NCK, number, C, K, BLOCK_K) + key).to(tl.float32) * leave_CK
        db_CK = tl.dot(tl.trans(zu_CC), a_CK, db_CK, input_precision="tf32")
        db_CK = tl.dot(tl.trans(ou_CC), r_CK, db_CK, input_precision="tf32")
        tl.store(db + at_out, (db_CK * rise_CK).to(db.dtype.element_ty), mask=inside_C1)
        moved_CK -= b_CK * db_CK

        dk_CK = tl.load(tile(dk_NCK, number, C, K, BLOCK_K) + key).to(tl.float32) * leave_CK
        dk_CK = tl.dot(tl.trans(zv_CC), a_CK, dk_CK, input_precision="tf32")
        dk_CK = tl.dot(tl.trans(ov_CC), r_CK, dk_CK, input_precision="tf32")
        tl.store(dk + at_out, (dk_CK * rise_CK).to(dk.dtype.element_ty), mask=inside_C1)
        moved_CK -= k_CK * dk_CK

        dlog_w_CK = running(moved_CK, C, True, False) - da_CK + e_1K
        e_1K += tl.sum(moved_CK, 0, keep_dims=True)
        # The first token of a document decays nothing, and what is steeper than the steepest acts like it.
        still_CK = (starts_C[:, None] > 0) | (w_CK <= STEEPEST)
        dlog_w_CK = tl.where(still_CK, 0.0, dlog_w_CK)
        tl.store(dlog_w + at_out, dlog_w_CK.to(dlog_w.dtype.element_ty), mask=inside_C1)
