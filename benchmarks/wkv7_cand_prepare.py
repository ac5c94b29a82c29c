import torch
import triton
import triton.language as tl
from trihybrid.ops.wkv7.triton.chunks import rows, tile, documents, exponents, inside, pairs, BITS
from trihybrid.ops.wkv7.triton.prepare import _inverse


@triton.jit
def _fetch(log_w, a, b, r, k, key, inside_C1):
    return (
        tl.load(log_w + key, mask=inside_C1, other=0.0),
        tl.load(a + key, mask=inside_C1, other=0.0),
        tl.load(b + key, mask=inside_C1, other=0.0),
        tl.load(r + key, mask=inside_C1, other=0.0),
        tl.load(k + key, mask=inside_C1, other=0.0),
    )


@triton.jit
def prep2(
    r,
    log_w,
    k,
    a,
    b,
    reset,
    w_NCK,
    r_NCK,
    b_NCK,
    k_NCK,
    p_NCC,
    g_NK,
    f_NCC,
    n_NCC,
    e_NCC,
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
    GRADIENT: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    rest = index // heads
    chunk, batch = rest % chunks, rest // chunks
    number = (batch * heads + head) * chunks + chunk
    start = chunk * C
    inside_C1 = inside(start, length, C, WHOLE)
    starts_C, document_C = documents(reset, batch, start, length, C, HAS_RESET)
    log_w = rows(log_w, w_stride_b, w_stride_t, w_stride_h, batch, head, start, C, BLOCK_K)
    r = rows(r, r_stride_b, r_stride_t, r_stride_h, batch, head, start, C, BLOCK_K)
    k = rows(k, k_stride_b, k_stride_t, k_stride_h, batch, head, start, C, BLOCK_K)
    a = rows(a, a_stride_b, a_stride_t, a_stride_h, batch, head, start, C, BLOCK_K)
    b = rows(b, b_stride_b, b_stride_t, b_stride_h, batch, head, start, C, BLOCK_K)
    loaded = ()
    for key in tl.static_range(0, AHEAD * BLOCK_K, BLOCK_K):
        loaded = loaded + (_fetch(log_w, a, b, r, k, key, inside_C1),)
    l_CC = tl.zeros((C, C), tl.float32)
    m_CC = tl.zeros((C, C), tl.float32)
    q_CC = tl.zeros((C, C), tl.float32)
    p_CC = tl.zeros((C, C), tl.float32)
    borders = tl.sum(starts_C, 0)
    later = ()
    early_C1 = (tl.arange(0, C) < C // 2)[:, None]
    i_C = tl.arange(0, C)
    ones_CC = (i_C[:, None] >= i_C[None, :]).to(tl.float32)
    exact: tl.constexpr = log_w.dtype.element_ty == tl.bfloat16
    for key in tl.static_range(0, K, BLOCK_K):
        w_CK, a_CK, b_CK, r_CK, k_CK = loaded[key // BLOCK_K]
        if key + AHEAD * BLOCK_K < K:
            loaded = loaded + (_fetch(log_w, a, b, r, k, key + AHEAD * BLOCK_K, inside_C1),)
        w_CK = tl.where(starts_C[:, None] > 0, 0.0, w_CK.to(tl.float32))
        w_CK = tl.where(w_CK < STEEPEST, STEEPEST, w_CK)
        if exact:
            c_CK = tl.dot(ones_CC, w_CK, input_precision="tf32") * BITS
        else:
            c_CK = tl.dot(ones_CC, w_CK, input_precision="tf32x3") * BITS
        middle_1K = tl.sum(tl.where(early_C1, w_CK, 0.0), 0, keep_dims=True) * BITS
        total_1K = tl.sum(w_CK, 0, keep_dims=True) * BITS
        c_CK -= middle_1K
        rise_CK = tl.exp2(-c_CK)
        a_CK = a_CK.to(tl.float32) * tl.exp2(c_CK - w_CK * BITS)
        r_CK = r_CK.to(tl.float32) * tl.exp2(c_CK)
        b_CK = b_CK.to(tl.float32) * rise_CK
        k_CK = k_CK.to(tl.float32) * rise_CK
        b_KC = tl.trans(b_CK)
        k_KC = tl.trans(k_CK)
        l_CC = tl.dot(a_CK, b_KC, l_CC, input_precision="tf32")
        m_CC = tl.dot(a_CK, k_KC, m_CC, input_precision="tf32")
        q_CC = tl.dot(r_CK, b_KC, q_CC, input_precision="tf32")
        p_CC = tl.dot(r_CK, k_KC, p_CC, input_precision="tf32")
        enter_CK = tl.exp2(middle_1K)
        leave_CK = tl.exp2(total_1K - middle_1K)
        gate_1K = tl.exp2(total_1K)
        if HAS_RESET:
            enter_CK = tl.where((document_C == 0)[:, None], enter_CK, 0.0)
            leave_CK = tl.where((document_C == borders)[:, None], leave_CK, 0.0)
            gate_1K = tl.where(borders == 0, gate_1K, 0.0)
        tl.store(tile(g_NK, number, 1, K, BLOCK_K) + key, gate_1K)
        later = later + (
            (
                (a_CK * enter_CK).to(tl.float16),
                (r_CK * enter_CK).to(tl.float16),
                (b_CK * leave_CK).to(tl.float16),
                (k_CK * leave_CK).to(tl.float16),
            ),
        )

    strict_CC = pairs(document_C, True, C)
    loose_CC = pairs(document_C, False, C)
    l_CC = tl.where(strict_CC, l_CC, 0.0)
    m_CC = tl.where(strict_CC, m_CC, 0.0)
    q_CC = tl.where(loose_CC, q_CC, 0.0).to(tl.float16)
    p_CC = tl.where(loose_CC, p_CC, 0.0)
    f_CC = _inverse(l_CC, C)
    n_CC = tl.dot(f_CC, m_CC.to(tl.float16)).to(tl.float16)
    tl.store(tile(p_NCC, number, C, C, C), tl.dot(q_CC, n_CC, p_CC).to(tl.float16))
    if GRADIENT:
        tl.store(tile(f_NCC, number, C, C, C), f_CC)
        tl.store(tile(n_NCC, number, C, C, C), n_CC)
        tl.store(tile(e_NCC, number, C, C, C), tl.dot(q_CC, f_CC).to(tl.float16))
    for key in tl.static_range(0, K, BLOCK_K):
        a_CK, r_CK, b_CK, k_CK = later[key // BLOCK_K]
        w_CK = tl.dot(f_CC, a_CK).to(tl.float16)
        tl.store(tile(w_NCK, number, C, K, BLOCK_K) + key, w_CK)
        tl.store(tile(b_NCK, number, C, K, BLOCK_K) + key, b_CK)
        tl.store(
            tile(r_NCK, number, C, K, BLOCK_K) + key, tl.dot(q_CC, w_CK, r_CK.to(tl.float32)).to(tl.float16)
        )
        k_CK = tl.dot(tl.trans(n_CC), b_CK, k_CK.to(tl.float32))
        tl.store(tile(k_NCK, number, C, K, BLOCK_K) + key, k_CK.to(tl.float16))


def prepare(r, log_w, k, a, b, reset, chunk, gradient, ahead=1, block=32):
    from trihybrid.ops.wkv7.triton.prepare import Prepared, steepest, strides

    batch, length, heads, width = r.shape
    chunks = triton.cdiv(length, chunk)
    count = batch * heads * chunks
    wide = torch.empty(4, count, chunk, width, device=r.device, dtype=torch.float16)
    square = torch.empty(4 if gradient else 1, count, chunk, chunk, device=r.device, dtype=torch.float16)
    g = torch.empty(count, width, device=r.device, dtype=torch.float32)
    p = square[0]
    prep2[(count,)](
        r,
        log_w,
        k,
        a,
        b,
        p,
        *wide,
        p,
        g,
        *(square[1:] if gradient else (p, p, p)),
        length,
        chunks,
        heads,
        *strides(r),
        *strides(log_w),
        *strides(k),
        *strides(a),
        *strides(b),
        STEEPEST=steepest(chunk),
        HAS_RESET=False,
        WHOLE=length % chunk == 0,
        GRADIENT=gradient,
        C=chunk,
        K=width,
        BLOCK_K=block,
        AHEAD=ahead,
        num_warps=1,
    )
    return Prepared(wide, square, g)
