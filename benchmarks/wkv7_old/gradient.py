"""The last part of the backward, without values: from gradients of the prepared tensors to those of the inputs.

With the letters of `prepare`; a group of chunks is walked from its end to its start:
    dP = tril(dP*)     dQ = tril(dP* N^T + dR* W^T)     dW += Q^T dR*     dN = Q^T dP* + B^ dK*^T     dB^ += N dK*
    dA^ = F^T dW       dM' = F^T dN     dL = tril(dA^ W^T + dM' N^T, -1)     dM = tril(dM', -1)
    dA~ = dA^ e^m + dL B- + dM K-       da = dA~ e^{c' - m}
    dR~ = dR* e^m + dQ B- + dP K-       dr = dR~ e^{c - m}
    dB- = dL^T A~ + dQ^T R~             db = dB- e^{m - c} + dB^ e^{c_C - c}
    dK- = dM^T A~ + dP^T R~             dk = dK- e^{m - c} + dK* e^{c_C - c}
    dlog_w_t = e + sum_{i >= t} (r dr - k dk - b db)_i + sum_{i > t} (a da)_i
where e = rowsum_V(dH' . h') at the end of the group, and the sums run to that end.

Legend: B batch, T time, H heads, K key width, C tokens of a chunk, N = B H chunks, G = B H groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wkv7_old.chunks import documents, exponents, pairs, rows, steepest, strides, tile
from wkv7_old.state import GROUP, power

BLOCK_K, WARPS, STAGES = 16, 1, 1  # one warp for the reason given in `prepare`


def differentiate(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    reset_BT: Tensor | None,
    scores: tuple[Tensor, Tensor, Tensor],
    sums: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    largest_BH: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of r, log_w, k, a, b, each contiguous and in the dtype of its input.

    inputs: r, log_w, k, a, b [B, T, H, K]; reset_BT: uint8 or None; scores: F, N, Q [N, C, C]; sums: what
    `sums.sum_values` returns.
    """
    r_BTHK = inputs[0]
    batch, length, heads, keys = r_BTHK.shape
    chunk = scores[0].shape[1]
    outputs = tuple(torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in inputs)
    groups = triton.cdiv(length, GROUP)
    _differentiate[(batch * heads * groups,)](
        *inputs,
        r_BTHK if reset_BT is None else reset_BT,
        *scores,
        *sums,
        largest_BH,
        *outputs,
        length,
        triton.cdiv(length, chunk),
        heads,
        *(stride for x in inputs for stride in strides(x)),
        STEEPEST=steepest(chunk),
        HAS_RESET=reset_BT is not None,
        GROUP_CHUNKS=GROUP // chunk,
        C=chunk,
        K=keys,
        BLOCK_K=min(BLOCK_K, keys),
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
    f_NCC,
    n_NCC,
    q_NCC,
    dr_NCK,
    dw_NCK,
    dk_NCK,
    db_NCK,
    dp_NCC,
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
    GROUP_CHUNKS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    groups = tl.cdiv(chunks, GROUP_CHUNKS)
    # Heads run fastest: programs that run together read whole tokens.
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    rest = index // heads
    group, batch = rest % groups, rest // groups
    lane = batch * heads + head
    back = 1.0 / power(tl.load(largest + lane))
    block_B1 = tl.arange(0, K // BLOCK_K)[:, None]
    e_BK = tl.load(tile(e_GK, lane * groups + group, K // BLOCK_K, BLOCK_K, BLOCK_K))
    first = (group * GROUP_CHUNKS).to(tl.int32)
    count = tl.minimum(GROUP_CHUNKS, chunks - first)
    # Nothing is moved out of the loop: the registers are full.
    for step in tl.range(0, count, disable_licm=True):
        chunk = first + count - 1 - step
        number = lane * chunks + chunk
        start = chunk.to(tl.int64) * C
        inside_C1 = (start + tl.arange(0, C) < length)[:, None]
        starts_C, document_C = documents(reset, batch, start, length, C, HAS_RESET)
        meets_C1 = (document_C == 0)[:, None]
        enters_C1 = (document_C == tl.sum(starts_C, 0))[:, None]
        at_w = rows(log_w, w_stride_b, w_stride_t, w_stride_h, batch, head, start, C, BLOCK_K)
        at_r = rows(r, r_stride_b, r_stride_t, r_stride_h, batch, head, start, C, BLOCK_K)
        at_k = rows(k, k_stride_b, k_stride_t, k_stride_h, batch, head, start, C, BLOCK_K)
        at_a = rows(a, a_stride_b, a_stride_t, a_stride_h, batch, head, start, C, BLOCK_K)
        at_b = rows(b, b_stride_b, b_stride_t, b_stride_h, batch, head, start, C, BLOCK_K)
        at_dr = tile(dr_NCK, number, C, K, BLOCK_K)
        at_dw = tile(dw_NCK, number, C, K, BLOCK_K)
        at_dk = tile(dk_NCK, number, C, K, BLOCK_K)
        at_db = tile(db_NCK, number, C, K, BLOCK_K)
        f_CC = tl.load(tile(f_NCC, number, C, C, C))
        n_CC = tl.load(tile(n_NCC, number, C, C, C))
        q_CC = tl.load(tile(q_NCC, number, C, C, C))
        dp_CC = tl.load(tile(dp_NCC, number, C, C, C))

        dq_CC = tl.zeros((C, C), tl.float32)
        dn_CC = tl.zeros((C, C), tl.float32)
        dl_CC = tl.zeros((C, C), tl.float32)
        for key in range(0, K, BLOCK_K):
            dr_CK = tl.load(at_dr + key)
            dw_CK = tl.load(at_dw + key).to(tl.float32)
            dk_CK = tl.load(at_dk + key)
            a_CK = tl.load(at_a + key, mask=inside_C1, other=0.0).to(tl.float32)
            b_CK = tl.load(at_b + key, mask=inside_C1, other=0.0).to(tl.float32)
            w_CK, c_CK, _, total_1K = exponents(at_w + key, starts_C, inside_C1, STEEPEST, C)
            a_CK *= tl.exp(c_CK - w_CK)
            b_CK *= tl.exp(total_1K - c_CK)
            if HAS_RESET:
                a_CK = tl.where(meets_C1, a_CK, 0.0)
                b_CK = tl.where(enters_C1, b_CK, 0.0)
            across_KC = tl.trans(tl.dot(f_CC, a_CK.to(tl.float16)).to(tl.float16))
            dq_CC = tl.dot(dr_CK, across_KC, dq_CC)
            dn_CC = tl.dot(b_CK.to(tl.float16), tl.trans(dk_CK), dn_CC)
            dw_CK = tl.dot(tl.trans(q_CC), dr_CK, dw_CK)
            da_CK = tl.dot(tl.trans(f_CC), dw_CK.to(tl.float16))
            dl_CC = tl.dot(da_CK.to(tl.float16), across_KC, dl_CC)

        strict_CC = pairs(document_C, True, C)
        loose_CC = pairs(document_C, False, C)
        dp_CC = tl.where(loose_CC, dp_CC, 0.0)
        dq_CC = tl.where(loose_CC, tl.dot(dp_CC, tl.trans(n_CC), dq_CC), 0.0)
        dn_CC = tl.dot(tl.trans(q_CC), dp_CC, dn_CC)
        dm_CC = tl.dot(tl.trans(f_CC), dn_CC.to(tl.float16))
        dl_CC = tl.where(strict_CC, tl.dot(dm_CC.to(tl.float16), tl.trans(n_CC), dl_CC), 0.0)
        dm_CC = tl.where(strict_CC, dm_CC, 0.0)
        dp_CC = dp_CC.to(tl.float32)

        at_out = ((batch * length + start) * heads + head) * K
        at_out += tl.arange(0, C)[:, None] * (heads * K) + tl.arange(0, BLOCK_K)[None, :]
        for key in range(0, K, BLOCK_K):
            w_CK, c_CK, middle_1K, total_1K = exponents(at_w + key, starts_C, inside_C1, STEEPEST, C)
            c_CK -= middle_1K
            enter_CK = tl.exp(middle_1K)
            leave_CK = tl.exp(total_1K - middle_1K)
            if HAS_RESET:
                enter_CK = tl.where(meets_C1, enter_CK, 0.0)
                leave_CK = tl.where(enters_C1, leave_CK, 0.0)
            grow_CK = tl.exp(c_CK - w_CK)
            fall_CK = tl.exp(c_CK)
            rise_CK = tl.exp(-c_CK)
            a_CK = tl.load(at_a + key, mask=inside_C1, other=0.0).to(tl.float32) * grow_CK
            r_CK = tl.load(at_r + key, mask=inside_C1, other=0.0).to(tl.float32) * fall_CK
            b_CK = tl.load(at_b + key, mask=inside_C1, other=0.0).to(tl.float32) * rise_CK
            k_CK = tl.load(at_k + key, mask=inside_C1, other=0.0).to(tl.float32) * rise_CK
            dr_CK = tl.load(at_dr + key)
            dk_CK = tl.load(at_dk + key)

            dw_CK = tl.dot(tl.trans(q_CC), dr_CK, tl.load(at_dw + key).to(tl.float32))
            da_CK = tl.dot(tl.trans(f_CC), dw_CK.to(tl.float16)) * enter_CK
            da_CK = tl.dot(dl_CC, b_CK, da_CK, input_precision="tf32")
            da_CK = tl.dot(dm_CC, k_CK, da_CK, input_precision="tf32")
            tl.store(da + at_out + key, (da_CK * grow_CK * back).to(da.dtype.element_ty), mask=inside_C1)
            da_CK *= a_CK

            dr_CK = dr_CK.to(tl.float32) * enter_CK
            dr_CK = tl.dot(dq_CC, b_CK, dr_CK, input_precision="tf32")
            dr_CK = tl.dot(dp_CC, k_CK, dr_CK, input_precision="tf32")
            tl.store(dr + at_out + key, (dr_CK * fall_CK * back).to(dr.dtype.element_ty), mask=inside_C1)
            moved_CK = da_CK + r_CK * dr_CK

            db_CK = tl.dot(n_CC, dk_CK, tl.load(at_db + key).to(tl.float32)) * leave_CK
            db_CK = tl.dot(tl.trans(dl_CC), a_CK, db_CK, input_precision="tf32")
            db_CK = tl.dot(tl.trans(dq_CC), r_CK, db_CK, input_precision="tf32")
            tl.store(db + at_out + key, (db_CK * rise_CK * back).to(db.dtype.element_ty), mask=inside_C1)
            moved_CK -= b_CK * db_CK

            dk_CK = dk_CK.to(tl.float32) * leave_CK
            dk_CK = tl.dot(tl.trans(dm_CC), a_CK, dk_CK, input_precision="tf32")
            dk_CK = tl.dot(tl.trans(dp_CC), r_CK, dk_CK, input_precision="tf32")
            tl.store(dk + at_out + key, (dk_CK * rise_CK * back).to(dk.dtype.element_ty), mask=inside_C1)
            moved_CK -= k_CK * dk_CK

            here_B1 = block_B1 == key // BLOCK_K
            e_1K = tl.sum(tl.where(here_B1, e_BK, 0.0), 0, keep_dims=True)
            dlog_w_CK = tl.cumsum(moved_CK, 0, reverse=True) - da_CK + e_1K
            e_BK += tl.where(here_B1, tl.sum(moved_CK, 0, keep_dims=True), 0.0)
            # The first token of a document decays nothing, and what is steeper than the steepest acts like it.
            still_CK = (starts_C[:, None] > 0) | (w_CK <= STEEPEST)
            dlog_w_CK = tl.where(still_CK, 0.0, dlog_w_CK * back)
            tl.store(dlog_w + at_out + key, dlog_w_CK.to(dlog_w.dtype.element_ty), mask=inside_C1)
