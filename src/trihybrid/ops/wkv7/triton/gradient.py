"""The last part of the backward: gradients of r, log_w, k, a and b, for all groups of chunks and blocks of keys in parallel.

With u_t = S_{t-1}^T a_t and z_t = b_t^T dS_t known for every token, nothing couples two keys. In a chunk, with the
letters of `prepare`, h the state that enters and dH' the gradient of the one that leaves,
    G_ZU = tril(Z U^T, -1)    G_ZV = tril(Z V^T, -1)    G_OU = tril(dO U^T)    G_OV = tril(dO V^T)
    dA~ = G_ZU B- + G_ZV K- + e^m Z h^T          da = dA~ e^{c' - m}
    dR~ = G_OU B- + G_OV K- + e^m dO h^T         dr = dR~ e^{c - m}
    dB- = G_ZU^T A~ + G_OU^T R~ + e^{c_C - m} U dH'^T          db = dB- e^{m - c}
    dK- = G_ZV^T A~ + G_OV^T R~ + e^{c_C - m} V dH'^T          dk = dK- e^{m - c}
    dlog_w_t = e + sum_{i >= t} (r dr - k dk - b db)_i + sum_{i > t} (a da)_i
where e = rowsum_V(dH' . h') at the end of the group, and the sums run to that end. Neither h nor dH' was kept for every
chunk. A group's first h walks forwards through it once more, h' = diag(g) h + K^^T V + B^^T U; then its last dH' walks
backwards, dH = diag(g) dH' + R^^T dO + A^^T Z. Tensors lie with keys along their rows, so that a state is ready to be
a left operand.

Legend: B batch, T time, H heads, K key width, V value width, C tokens of a chunk, N = B H chunks, G = B H groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.wkv7.triton.chunks import columns, decays, documents, pairs, rows, running, steepest, strides, tile
from trihybrid.ops.wkv7.triton.state import GROUP, power

BLOCK_K, STAGES = 64, 1
KEYS_A_WARP = 16
WARPS = 0


def differentiate(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    v_BTHV: Tensor,
    do_BTHV: Tensor,
    reset_BT: Tensor | None,
    u_NCV: Tensor,
    z_NCV: Tensor,
    kept_GVK: Tensor,
    dkept_GVK: Tensor,
    largest_BH: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of r, log_w, k, a, b, each contiguous and in the dtype of its input.

    inputs: r, log_w, k, a, b [B, T, H, K]; reset_BT: uint8 or None; the rest is what `state.walk` and
    `state.walk_back` return.
    """
    batch, length, heads, keys = inputs[0].shape
    chunk, width = u_NCV.shape[1:]
    outputs = tuple(torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in inputs)
    groups = triton.cdiv(length, GROUP)
    block = min(BLOCK_K, keys)
    across_NCK, read_NCK = (u_NCV.new_empty(len(u_NCV), chunk, keys) for _ in range(2))
    _differentiate[(batch * heads * groups * (keys // block),)](
        *inputs,
        v_BTHV,
        do_BTHV,
        inputs[0] if reset_BT is None else reset_BT,
        u_NCV,
        z_NCV,
        kept_GVK,
        dkept_GVK,
        largest_BH,
        across_NCK,
        read_NCK,
        *outputs,
        length,
        triton.cdiv(length, chunk),
        heads,
        *(stride for x in (*inputs, v_BTHV, do_BTHV) for stride in strides(x)),
        STEEPEST=steepest(chunk),
        HAS_RESET=reset_BT is not None,
        GROUP_CHUNKS=GROUP // chunk,
        C=chunk,
        K=keys,
        V=width,
        BLOCK_K=block,
        num_warps=WARPS or max(block // KEYS_A_WARP, 1),
        num_stages=STAGES,
    )
    return outputs


@triton.jit
def _values(x, stride_b, stride_t, stride_h, batch, head, start, length, scale, C: tl.constexpr, V: tl.constexpr):
    """Rows of V, or of dO, times the scale, in float16."""
    at = rows(x, stride_b, stride_t, stride_h, batch, head, start, C, V)
    x_CV = tl.load(at, mask=(start + tl.arange(0, C) < length)[:, None], other=0.0)
    return (x_CV.to(tl.float32) * scale).to(tl.float16)


@triton.jit
def _differentiate(
    r, log_w, k, a, b, v, do, reset, u_NCV, z_NCV, kept_GVK, dkept_GVK, largest, across_NCK, read_NCK, dr, dlog_w, dk, da, db,
    length, chunks, heads, r_b, r_t, r_h, w_b, w_t, w_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h,
    v_b, v_t, v_h, do_b, do_t, do_h, STEEPEST: tl.constexpr, HAS_RESET: tl.constexpr, GROUP_CHUNKS: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(chunks, GROUP_CHUNKS)
    # Blocks of keys run together, since they read the same values, and then heads: they share tokens.
    blocks: tl.constexpr = K // BLOCK_K
    index = (tl.program_id(0) // blocks).to(tl.int64)
    head = index % heads
    rest = index // heads
    group, batch = rest % groups, rest // groups
    lane = batch * heads + head
    key_K = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = power(tl.load(largest + lane))
    back = 1.0 / scale
    first = group * GROUP_CHUNKS
    at_KV = (lane * (groups + 1) + group) * (K * V) + tl.arange(0, V)[None, :] * K + key_K[:, None]
    count = tl.minimum(GROUP_CHUNKS, chunks - first.to(tl.int32))
    i_C = tl.arange(0, C)

    h_KV = tl.load(kept_GVK + at_KV).to(tl.float32)
    for step in tl.range(0, count, disable_licm=True):
        chunk = first + step
        number = lane * chunks + chunk
        start = chunk * C
        inside_1C = (start + i_C < length)[None, :]
        starts_C, document_C = documents(reset, batch, start, length, C, HAS_RESET)
        borders = tl.sum(starts_C, 0)
        w_KC, total_K1, _ = decays(
            columns(log_w, w_b, w_t, w_h, batch, head, start, key_K, C), starts_C, inside_1C, STEEPEST, C
        )
        leave_KC = tl.exp(total_K1 - running(w_KC, C, False))
        gate_K1 = tl.exp(total_K1)
        if HAS_RESET:
            leave_KC = tl.where((document_C == borders)[None, :], leave_KC, 0.0)
            gate_K1 = tl.where(borders == 0, gate_K1, 0.0)
        b_KC = tl.load(columns(b, b_b, b_t, b_h, batch, head, start, key_K, C), mask=inside_1C, other=0.0)
        k_KC = tl.load(columns(k, k_b, k_t, k_h, batch, head, start, key_K, C), mask=inside_1C, other=0.0)
        z_CV = tl.load(tile(z_NCV, number, C, V, V))
        u_CV = tl.load(tile(u_NCV, number, C, V, V))
        v_CV = _values(v, v_b, v_t, v_h, batch, head, start, length, 1.0, C, V)
        do_CV = _values(do, do_b, do_t, do_h, batch, head, start, length, scale, C, V)
        half_KV = h_KV.to(tl.float16)
        at_KC = number * (C * K) + i_C[None, :] * K + key_K[:, None]
        tl.store(across_NCK + at_KC, tl.dot(half_KV, tl.trans(z_CV)).to(tl.float16))
        tl.store(read_NCK + at_KC, tl.dot(half_KV, tl.trans(do_CV)).to(tl.float16))
        h_KV *= gate_K1
        h_KV = tl.dot((b_KC.to(tl.float32) * leave_KC).to(tl.float16), u_CV, h_KV)
        h_KV = tl.dot((k_KC.to(tl.float32) * leave_KC).to(tl.float16), v_CV, h_KV)

    dh_KV = tl.load(dkept_GVK + at_KV + K * V).to(tl.float32)
    e_K1 = tl.sum(h_KV * dh_KV, 1, keep_dims=True)
    tl.debug_barrier()  # what some threads stored others may load
    for step in tl.range(0, count, disable_licm=True):
        chunk = first + count - 1 - step
        number = lane * chunks + chunk
        start = chunk * C
        inside_1C = (start + i_C < length)[None, :]
        starts_C, document_C = documents(reset, batch, start, length, C, HAS_RESET)
        strict_CC = pairs(document_C, True, C)
        loose_CC = pairs(document_C, False, C)
        z_CV = tl.load(tile(z_NCV, number, C, V, V))
        u_CV = tl.load(tile(u_NCV, number, C, V, V))
        v_CV = _values(v, v_b, v_t, v_h, batch, head, start, length, 1.0, C, V)
        do_CV = _values(do, do_b, do_t, do_h, batch, head, start, length, scale, C, V)
        zu_CC = tl.where(strict_CC, tl.dot(z_CV, tl.trans(u_CV)), 0.0)
        zv_CC = tl.where(strict_CC, tl.dot(z_CV, tl.trans(v_CV)), 0.0)
        ou_CC = tl.where(loose_CC, tl.dot(do_CV, tl.trans(u_CV)), 0.0)
        ov_CC = tl.where(loose_CC, tl.dot(do_CV, tl.trans(v_CV)), 0.0)

        w_KC, total_K1, middle_K1 = decays(
            columns(log_w, w_b, w_t, w_h, batch, head, start, key_K, C), starts_C, inside_1C, STEEPEST, C
        )
        c_KC = running(w_KC, C, False) - middle_K1
        enter_KC = tl.exp(middle_K1)
        leave_KC = tl.exp(total_K1 - middle_K1)
        gate_K1 = tl.exp(total_K1)
        if HAS_RESET:
            borders = tl.sum(starts_C, 0)
            enter_KC = tl.where((document_C == 0)[None, :], enter_KC, 0.0)
            leave_KC = tl.where((document_C == borders)[None, :], leave_KC, 0.0)
            gate_K1 = tl.where(borders == 0, gate_K1, 0.0)
        half_KV = dh_KV.to(tl.float16)
        db_KC = tl.dot(half_KV, tl.trans(u_CV)) * leave_KC
        dk_KC = tl.dot(half_KV, tl.trans(v_CV)) * leave_KC
        dh_KV *= gate_K1
        grow_KC = tl.exp(c_KC - w_KC)
        a_KC = tl.load(columns(a, a_b, a_t, a_h, batch, head, start, key_K, C), mask=inside_1C, other=0.0)
        a_KC = a_KC.to(tl.float32) * grow_KC
        dh_KV = tl.dot((a_KC * enter_KC).to(tl.float16), z_CV, dh_KV)
        db_KC = tl.dot(a_KC, zu_CC, db_KC, input_precision="tf32")
        dk_KC = tl.dot(a_KC, zv_CC, dk_KC, input_precision="tf32")
        fall_KC = tl.exp(c_KC)
        r_KC = tl.load(columns(r, r_b, r_t, r_h, batch, head, start, key_K, C), mask=inside_1C, other=0.0)
        r_KC = r_KC.to(tl.float32) * fall_KC
        dh_KV = tl.dot((r_KC * enter_KC).to(tl.float16), do_CV, dh_KV)
        db_KC = tl.dot(r_KC, ou_CC, db_KC, input_precision="tf32")
        dk_KC = tl.dot(r_KC, ov_CC, dk_KC, input_precision="tf32")
        rise_KC = tl.exp(-c_KC)
        at_KC = number * (C * K) + i_C[None, :] * K + key_K[:, None]
        at_out = ((batch * length + start) * heads + head) * K
        at_out += i_C[None, :] * (heads * K) + key_K[:, None]
        b_KC = tl.load(columns(b, b_b, b_t, b_h, batch, head, start, key_K, C), mask=inside_1C, other=0.0)
        b_KC = b_KC.to(tl.float32) * rise_KC
        tl.store(db + at_out, (db_KC * rise_KC * back).to(db.dtype.element_ty), mask=inside_1C)
        moved_KC = b_KC * db_KC
        k_KC = tl.load(columns(k, k_b, k_t, k_h, batch, head, start, key_K, C), mask=inside_1C, other=0.0)
        k_KC = k_KC.to(tl.float32) * rise_KC
        tl.store(dk + at_out, (dk_KC * rise_KC * back).to(dk.dtype.element_ty), mask=inside_1C)
        moved_KC += k_KC * dk_KC
        dr_KC = tl.load(read_NCK + at_KC).to(tl.float32) * enter_KC
        dr_KC = tl.dot(b_KC, tl.trans(ou_CC), dr_KC, input_precision="tf32")
        dr_KC = tl.dot(k_KC, tl.trans(ov_CC), dr_KC, input_precision="tf32")
        tl.store(dr + at_out, (dr_KC * fall_KC * back).to(dr.dtype.element_ty), mask=inside_1C)
        moved_KC = r_KC * dr_KC - moved_KC
        da_KC = tl.load(across_NCK + at_KC).to(tl.float32) * enter_KC
        da_KC = tl.dot(b_KC, tl.trans(zu_CC), da_KC, input_precision="tf32")
        da_KC = tl.dot(k_KC, tl.trans(zv_CC), da_KC, input_precision="tf32")
        tl.store(da + at_out, (da_KC * grow_KC * back).to(da.dtype.element_ty), mask=inside_1C)
        da_KC *= a_KC
        moved_KC += da_KC

        dlog_w_KC = running(moved_KC, C, True) - da_KC + e_K1
        e_K1 += tl.sum(moved_KC, 1, keep_dims=True)
        # The first token of a document decays nothing, and what is steeper than the steepest acts like it.
        still_KC = (starts_C[None, :] > 0) | (w_KC <= STEEPEST)
        dlog_w_KC = tl.where(still_KC, 0.0, dlog_w_KC * back)
        tl.store(dlog_w + at_out, dlog_w_KC.to(dlog_w.dtype.element_ty), mask=inside_1C)
