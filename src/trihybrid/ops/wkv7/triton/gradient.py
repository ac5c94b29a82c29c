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

from trihybrid.ops.wkv7.triton.chunks import (
    BITS,
    documents,
    exponents,
    inside,
    pairs,
    plane,
    recurrent,
    rows,
    running,
    steepest,
    strides,
    tile,
)
from trihybrid.ops.wkv7.triton.state import GROUP, power

BLOCK_K, WARPS, STAGES = 32, 1, 1  # one warp for the reason given in `prepare`


def differentiate(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    reset_BT: Tensor | None,
    scores_4NCC: Tensor,
    sums_4NCK: Tensor,
    e_GK: Tensor,
    largest_BH: Tensor,
    parts: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """Gradients of r, log_w, k, a, b, each contiguous and in the dtype of its input.

    inputs: r, log_w, k, a, b [B, T, H, K]; reset_BT: uint8 or None; the rest is what `sums.sum_values` returns.
    parts: None, or for k [B, T, G, K], kk [B, T, G, K] and iclr in the place of k, a and b (`chunks.recurrent`), the
        dtype of what each head adds to the gradients of k and kk, which is returned [B, T, H, K].
    """
    r_BTHK = inputs[0]
    batch, length, heads, keys = r_BTHK.shape
    chunk = scores_4NCC.shape[2]
    grouped = parts is not None
    dtypes = [parts if grouped and at in (2, 3) else x.dtype for at, x in enumerate(inputs)]
    outputs = tuple(torch.empty(r_BTHK.shape, device=r_BTHK.device, dtype=dtype) for dtype in dtypes)
    groups = triton.cdiv(length, GROUP)
    block = min(BLOCK_K, keys)
    _differentiate[(batch * heads * groups * (keys // block),)](
        *inputs,
        r_BTHK if reset_BT is None else reset_BT,
        scores_4NCC,
        sums_4NCK,
        e_GK,
        largest_BH,
        *outputs,
        length,
        triton.cdiv(length, chunk),
        heads,
        heads // inputs[2].shape[2],
        *(stride for x in inputs for stride in strides(x)),
        STEEPEST=steepest(chunk),
        HAS_RESET=reset_BT is not None,
        WHOLE=length % chunk == 0,
        GROUPED=grouped,
        GROUP_CHUNKS=GROUP // chunk,
        C=chunk,
        K=keys,
        BLOCK_K=block,
        STAGES=STAGES,
        num_warps=WARPS,
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
    scores_4NCC,
    sums_4NCK,
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
    GROUPED: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    groups = tl.cdiv(chunks, GROUP_CHUNKS)
    # Blocks of keys run together, and then heads: they share tokens.
    blocks: tl.constexpr = K // BLOCK_K
    key = tl.program_id(0) % blocks * BLOCK_K
    index = (tl.program_id(0) // blocks).to(tl.int64)
    head = index % heads
    rest = index // heads
    group, batch = rest % groups, rest // groups
    shared = head // repeats
    lane = batch * heads + head
    back = 1.0 / power(tl.load(largest + lane))
    e_1K = back * tl.load(e_GK + (lane * groups + group) * K + key + tl.arange(0, BLOCK_K))[None, :]
    every = (tl.num_programs(0) // (groups * blocks)).to(tl.int64) * chunks
    first = (group * GROUP_CHUNKS).to(tl.int32)
    count = tl.minimum(GROUP_CHUNKS, chunks - first)
    # Nothing is moved out of the loop: registers are few.
    for step in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        chunk = first + count - 1 - step
        number = lane * chunks + chunk
        start = chunk.to(tl.int64) * C
        inside_C1 = inside(start, length, C, WHOLE)
        starts_C, document_C = documents(reset, batch, start, length, C, HAS_RESET)
        at_w = rows(log_w + key, w_stride_b, w_stride_t, w_stride_h, batch, head, start, C, BLOCK_K)
        at_r = rows(r + key, r_stride_b, r_stride_t, r_stride_h, batch, head, start, C, BLOCK_K)
        at_k = rows(k + key, k_stride_b, k_stride_t, k_stride_h, batch, shared, start, C, BLOCK_K)
        at_a = rows(a + key, a_stride_b, a_stride_t, a_stride_h, batch, shared, start, C, BLOCK_K)
        at_b = rows(b + key, b_stride_b, b_stride_t, b_stride_h, batch, head, start, C, BLOCK_K)
        # All of a chunk is asked for at once: what comes after the first exchange between threads waits for it.
        w_CK = tl.load(at_w, mask=inside_C1, other=0.0)
        a_CK = tl.load(at_a, mask=inside_C1, other=0.0)
        r_CK = tl.load(at_r, mask=inside_C1, other=0.0)
        b_CK = tl.load(at_b, mask=inside_C1, other=0.0)
        k_CK = tl.load(at_k, mask=inside_C1, other=0.0)
        zu_CC = tl.load(tile(scores_4NCC, number, C, C, C))
        zv_CC = tl.load(tile(plane(scores_4NCC, 1, every, C * C), number, C, C, C))
        ou_CC = tl.load(tile(plane(scores_4NCC, 2, every, C * C), number, C, C, C))
        ov_CC = tl.load(tile(plane(scores_4NCC, 3, every, C * C), number, C, C, C))
        da_CK = tl.load(tile(plane(sums_4NCK, 1, every, C * K), number, C, K, BLOCK_K) + key)
        dr_CK = tl.load(tile(sums_4NCK, number, C, K, BLOCK_K) + key)
        db_CK = tl.load(tile(plane(sums_4NCK, 3, every, C * K), number, C, K, BLOCK_K) + key)
        dk_CK = tl.load(tile(plane(sums_4NCK, 2, every, C * K), number, C, K, BLOCK_K) + key)
        if GROUPED:
            # k (1 - exp(log_w) + iclr), kk and iclr, of which k, a and b were made.
            key_CK, unit_CK, iclr_CK = k_CK.to(tl.float32), a_CK.to(tl.float32), b_CK.to(tl.float32)
            decay_CK = tl.exp2(w_CK.to(tl.float32) * BITS)
        k_CK, a_CK, b_CK = recurrent(k_CK, a_CK, b_CK, w_CK, GROUPED)
        w_CK, c_CK, middle_1K, total_1K = exponents(w_CK, starts_C, STEEPEST, C)
        c_CK -= middle_1K
        enter_CK = tl.exp2(middle_1K) * back
        leave_CK = tl.exp2(total_1K - middle_1K) * back
        if HAS_RESET:
            enter_CK = tl.where((document_C == 0)[:, None], enter_CK, 0.0)
            leave_CK = tl.where((document_C == tl.sum(starts_C, 0))[:, None], leave_CK, 0.0)
        grow_CK = tl.exp2(c_CK - w_CK * BITS)
        fall_CK = tl.exp2(c_CK)
        rise_CK = tl.exp2(-c_CK)
        a_CK *= grow_CK
        r_CK = r_CK.to(tl.float32) * fall_CK
        b_CK *= rise_CK
        k_CK *= rise_CK
        strict_CC = pairs(document_C, True, C)
        loose_CC = pairs(document_C, False, C)
        zu_CC = tl.where(strict_CC, zu_CC.to(tl.float32) * back, 0.0)
        zv_CC = tl.where(strict_CC, zv_CC.to(tl.float32) * back, 0.0)
        ou_CC = tl.where(loose_CC, ou_CC.to(tl.float32) * back, 0.0)
        ov_CC = tl.where(loose_CC, ov_CC.to(tl.float32) * back, 0.0)
        at_out = ((batch * length + start) * heads + head) * K + key
        at_out += tl.arange(0, C)[:, None] * (heads * K) + tl.arange(0, BLOCK_K)[None, :]

        da_CK = da_CK.to(tl.float32) * enter_CK
        da_CK = tl.dot(zu_CC, b_CK, da_CK, input_precision="tf32")
        da_CK = tl.dot(zv_CC, k_CK, da_CK, input_precision="tf32")
        own_da_CK = da_CK * grow_CK
        if not GROUPED:
            tl.store(da + at_out, own_da_CK.to(da.dtype.element_ty), mask=inside_C1)
        da_CK *= a_CK

        dr_CK = dr_CK.to(tl.float32) * enter_CK
        dr_CK = tl.dot(ou_CC, b_CK, dr_CK, input_precision="tf32")
        dr_CK = tl.dot(ov_CC, k_CK, dr_CK, input_precision="tf32")
        tl.store(dr + at_out, (dr_CK * fall_CK).to(dr.dtype.element_ty), mask=inside_C1)
        moved_CK = da_CK + r_CK * dr_CK

        db_CK = db_CK.to(tl.float32) * leave_CK
        db_CK = tl.dot(tl.trans(zu_CC), a_CK, db_CK, input_precision="tf32")
        db_CK = tl.dot(tl.trans(ou_CC), r_CK, db_CK, input_precision="tf32")
        own_db_CK = db_CK * rise_CK
        if GROUPED:  # of kk
            tl.store(da + at_out, (own_db_CK * iclr_CK - own_da_CK).to(da.dtype.element_ty), mask=inside_C1)
        else:
            tl.store(db + at_out, own_db_CK.to(db.dtype.element_ty), mask=inside_C1)
        moved_CK -= b_CK * db_CK

        dk_CK = dk_CK.to(tl.float32) * leave_CK
        dk_CK = tl.dot(tl.trans(zv_CC), a_CK, dk_CK, input_precision="tf32")
        dk_CK = tl.dot(tl.trans(ov_CC), r_CK, dk_CK, input_precision="tf32")
        own_dk_CK = dk_CK * rise_CK
        moved_CK -= k_CK * dk_CK
        if GROUPED:
            dscale_CK = own_dk_CK * key_CK  # of 1 - exp(log_w) + iclr
            own_dk_CK *= 1.0 - decay_CK + iclr_CK
            diclr_CK = own_db_CK * unit_CK + dscale_CK
            tl.store(db + at_out, diclr_CK.to(db.dtype.element_ty), mask=inside_C1)
        tl.store(dk + at_out, own_dk_CK.to(dk.dtype.element_ty), mask=inside_C1)

        dlog_w_CK = running(moved_CK, C, True, False) - da_CK + e_1K
        e_1K += tl.sum(moved_CK, 0, keep_dims=True)
        # The first token of a document decays nothing, and what is steeper than the steepest acts like it.
        still_CK = (starts_C[:, None] > 0) | (w_CK <= STEEPEST)
        dlog_w_CK = tl.where(still_CK, 0.0, dlog_w_CK)
        if GROUPED:
            dlog_w_CK -= dscale_CK * decay_CK
        tl.store(dlog_w + at_out, dlog_w_CK.to(dlog_w.dtype.element_ty), mask=inside_C1)
