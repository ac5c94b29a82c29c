import torch
import triton
import triton.language as tl
from trihybrid.ops.wkv7.triton.chunks import BITS, documents, inside, pairs, plane, recurrent, rows, tile


@triton.jit
def inverse3(l_WCC, C: tl.constexpr):
    i_C = tl.arange(0, C)
    pair_CC = i_C[:, None] // 2 == i_C[None, :] // 2
    one_CC = i_C[:, None] == i_C[None, :]
    f_WCC = tl.where(one_CC[None], 1.0, tl.where(pair_CC[None], l_WCC, 0.0))
    for level in tl.static_range(1, 6):
        if 2**level < C:
            part_C = i_C // 2**level
            corner_CC = (part_C[:, None] == part_C[None, :] + 1) & (part_C[None, :] % 2 == 0)
            half_WCC = f_WCC.to(tl.float16)
            moved_WCC = tl.dot(half_WCC, tl.where(corner_CC[None], l_WCC, 0.0).to(tl.float16))
            f_WCC = tl.dot(moved_WCC.to(tl.float16), half_WCC, f_WCC)
    return f_WCC.to(tl.float16)


@triton.jit
def whole(x_WCC):
    """The sum over warps, for each of them."""
    return tl.broadcast_to(tl.sum(x_WCC, 0, keep_dims=True), x_WCC.shape)


@triton.jit
def prep3(
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
    WARPS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    rest = index // heads
    chunk, batch = rest % chunks, rest // chunks
    number = (batch * heads + head) * chunks + chunk
    start = chunk * C
    count = tl.num_programs(0).to(tl.int64)
    inside_C1 = inside(start, length, C, WHOLE)
    starts_C, document_C = documents(reset, batch, start, length, C, HAS_RESET)
    OWN: tl.constexpr = K // WARPS
    apart = tl.arange(0, WARPS)[:, None, None] * OWN
    log_w = rows(log_w, w_stride_b, w_stride_t, w_stride_h, batch, head, start, C, BLOCK_K)[None] + apart
    r = rows(r, r_stride_b, r_stride_t, r_stride_h, batch, head, start, C, BLOCK_K)[None] + apart
    k = rows(k, k_stride_b, k_stride_t, k_stride_h, batch, head // repeats, start, C, BLOCK_K)[None] + apart
    a = rows(a, a_stride_b, a_stride_t, a_stride_h, batch, head // repeats, start, C, BLOCK_K)[None] + apart
    b = rows(b, b_stride_b, b_stride_t, b_stride_h, batch, head, start, C, BLOCK_K)[None] + apart
    there = inside_C1[None]
    loaded = ()
    for key in tl.static_range(0, OWN, BLOCK_K):
        loaded = loaded + (
            (
                tl.load(log_w + key, mask=there, other=0.0),
                tl.load(k + key, mask=there, other=0.0),
                tl.load(a + key, mask=there, other=0.0),
                tl.load(b + key, mask=there, other=0.0),
                tl.load(r + key, mask=there, other=0.0),
            ),
        )
    l_WCC = tl.zeros((WARPS, C, C), tl.float32)
    m_WCC = tl.zeros((WARPS, C, C), tl.float32)
    q_WCC = tl.zeros((WARPS, C, C), tl.float32)
    p_WCC = tl.zeros((WARPS, C, C), tl.float32)
    borders = tl.sum(starts_C, 0)
    early_1C1 = (tl.arange(0, C) < C // 2)[None, :, None]
    i_C = tl.arange(0, C)
    ones_WCC = tl.broadcast_to((i_C[:, None] >= i_C[None, :]).to(tl.float32)[None], (WARPS, C, C))
    exact: tl.constexpr = log_w.dtype.element_ty == tl.bfloat16
    later = ()
    for key in tl.static_range(0, OWN, BLOCK_K):
        w_WCK, k_WCK, a_WCK, b_WCK, r_WCK = loaded[key // BLOCK_K]
        k_WCK, a_WCK, b_WCK = recurrent(k_WCK, a_WCK, b_WCK, w_WCK, GROUPED)
        w_WCK = tl.where(starts_C[None, :, None] > 0, 0.0, w_WCK.to(tl.float32))
        w_WCK = tl.where(w_WCK < STEEPEST, STEEPEST, w_WCK)
        if exact:
            c_WCK = tl.dot(ones_WCC, w_WCK, input_precision="tf32") * BITS
        else:
            c_WCK = tl.dot(ones_WCC, w_WCK, input_precision="tf32x3") * BITS
        middle_W1K = tl.sum(tl.where(early_1C1, w_WCK, 0.0), 1, keep_dims=True) * BITS
        total_W1K = tl.sum(w_WCK, 1, keep_dims=True) * BITS
        c_WCK -= middle_W1K
        rise_WCK = tl.exp2(-c_WCK)
        a_WCK *= tl.exp2(c_WCK - w_WCK * BITS)
        r_WCK = r_WCK.to(tl.float32) * tl.exp2(c_WCK)
        b_WCK *= rise_WCK
        k_WCK *= rise_WCK
        b_WKC = tl.trans(b_WCK, (0, 2, 1))
        k_WKC = tl.trans(k_WCK, (0, 2, 1))
        l_WCC = tl.dot(a_WCK, b_WKC, l_WCC, input_precision="tf32")
        m_WCC = tl.dot(a_WCK, k_WKC, m_WCC, input_precision="tf32")
        q_WCC = tl.dot(r_WCK, b_WKC, q_WCC, input_precision="tf32")
        p_WCC = tl.dot(r_WCK, k_WKC, p_WCC, input_precision="tf32")
        enter_WCK = tl.exp2(middle_W1K)
        leave_WCK = tl.exp2(total_W1K - middle_W1K)
        gate_W1K = tl.exp2(total_W1K)
        if HAS_RESET:
            enter_WCK = tl.where((document_C == 0)[None, :, None], enter_WCK, 0.0)
            leave_WCK = tl.where((document_C == borders)[None, :, None], leave_WCK, 0.0)
            gate_W1K = tl.where(borders == 0, gate_W1K, 0.0)
        at_g = g_NK + number * K + key + apart + tl.arange(0, BLOCK_K)[None, None, :]
        tl.store(at_g, gate_W1K)
        later = later + (
            (
                (a_WCK * enter_WCK).to(tl.float16),
                (r_WCK * enter_WCK).to(tl.float16),
                (b_WCK * leave_WCK).to(tl.float16),
                (k_WCK * leave_WCK).to(tl.float16),
            ),
        )

    strict_CC = pairs(document_C, True, C)[None]
    loose_CC = pairs(document_C, False, C)[None]
    l_WCC = tl.where(strict_CC, whole(l_WCC), 0.0)
    m_WCC = tl.where(strict_CC, whole(m_WCC), 0.0).to(tl.float16)
    q_WCC = tl.where(loose_CC, whole(q_WCC), 0.0).to(tl.float16)
    p_WCC = tl.where(loose_CC, whole(p_WCC), 0.0)
    f_WCC = inverse3(l_WCC, C)
    n_WCC = tl.dot(f_WCC, m_WCC).to(tl.float16)
    # Every warp has the same; the first one writes.
    first = tl.arange(0, WARPS)[:, None, None] == 0
    at_square = tile(square_4NCC, number, C, C, C)[None] + tl.zeros((WARPS, 1, 1), tl.int32)
    tl.store(at_square, tl.dot(q_WCC, n_WCC, p_WCC).to(tl.float16), mask=first)
    if GRADIENT:
        tl.store(plane(at_square, 1, count, C * C), f_WCC, mask=first)
        tl.store(plane(at_square, 2, count, C * C), n_WCC, mask=first)
        tl.store(plane(at_square, 3, count, C * C), tl.dot(q_WCC, f_WCC).to(tl.float16), mask=first)
    at_wide = tile(wide_4NCK, number, C, K, BLOCK_K)[None] + apart
    for key in tl.static_range(0, OWN, BLOCK_K):
        a_WCK, r_WCK, b_WCK, k_WCK = later[key // BLOCK_K]
        w_WCK = tl.dot(f_WCC, a_WCK).to(tl.float16)
        tl.store(at_wide + key, w_WCK)
        tl.store(plane(at_wide, 2, count, C * K) + key, b_WCK)
        tl.store(
            plane(at_wide, 1, count, C * K) + key, tl.dot(q_WCC, w_WCK, r_WCK.to(tl.float32)).to(tl.float16)
        )
        k_WCK = tl.dot(tl.trans(n_WCC, (0, 2, 1)), b_WCK, k_WCK.to(tl.float32))
        tl.store(plane(at_wide, 3, count, C * K) + key, k_WCK.to(tl.float16))


def prepare(r, log_w, k, a, b, reset, chunk, gradient, grouped=False, warps=2, block=32):
    from trihybrid.ops.wkv7.triton.prepare import Prepared, steepest, strides

    batch, length, heads, width = r.shape
    chunks = triton.cdiv(length, chunk)
    count = batch * heads * chunks
    wide = torch.empty(4, count, chunk, width, device=r.device, dtype=torch.float16)
    square = torch.empty(4 if gradient else 1, count, chunk, chunk, device=r.device, dtype=torch.float16)
    g = torch.empty(count, width, device=r.device, dtype=torch.float32)
    prep3[(count,)](
        r,
        log_w,
        k,
        a,
        b,
        g if reset is None else reset,
        wide,
        square,
        g,
        length,
        chunks,
        heads,
        heads // k.shape[2],
        *strides(r),
        *strides(log_w),
        *strides(k),
        *strides(a),
        *strides(b),
        STEEPEST=steepest(chunk),
        HAS_RESET=reset is not None,
        WHOLE=length % chunk == 0,
        GRADIENT=gradient,
        GROUPED=grouped,
        C=chunk,
        K=width,
        BLOCK_K=block,
        WARPS=warps,
        num_warps=warps,
    )
    return Prepared(wide, square, g)
