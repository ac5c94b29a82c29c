"""The serial chain: the state walks over the chunks, one program for each head and block of values.

Forwards (the letters are those of `prepare`), with the state held as h^T [V, K], for every chunk
    U^T = h^T W^T     o^T = h^T R*^T + V^T P*^T     h'^T = h^T diag(g) + U^T B^ + V^T K*.
The gradient of the state walks backwards by the same equations, with W and B^, R* and K* exchanged and P* transposed:
    Z^T = dH'^T B^^T     dV^T = dH'^T K*^T + dO^T P*     dH^T = dH'^T diag(g) + Z^T W + dO^T R*.
For the gradients, the chain also leaves what u_t = S_{t-1}^T a_t and z_t = dS_t^T b_t truly are for every token,
    U + N V     and     F^T Z + E^T dO.
Transposed, a product that the next one reads is already where that one wants it, in registers: with all warps along
the values nothing of the chain goes through shared memory. Value columns never meet.

Gradients are held in float16 as well, times a power of two for each head that brings the largest of dO and dS to about
2^-6: with 10 bits, where bfloat16 has 7, and far from both ends of its range.

Legend: B batch, T time, H heads, K key width, V value width, C tokens of a chunk, N = B H chunks, G = B H groups.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.wkv7.triton import GROUP
from trihybrid.ops.wkv7.triton.chunks import columns, plane, rows, strides, tile
from trihybrid.ops.wkv7.triton.prepare import Prepared

# Values of a program: few while there are processors without one, more when all have some, which read less then.
NARROW, WIDE = 32, 64
MANY = 512  # programs with NARROW values
STAGES, STAGES_LONG = 4, 3  # how far ahead tiles are fetched, for chunks of 16 and of 32 tokens
VALUES_A_WARP = 16
PART = 64  # keys of the state that are one tensor; all of them backwards with NARROW values
ROWS = 128  # tokens that one program searches for the largest gradient


def walk(
    ready: Prepared, v_BTGV: Tensor, heads: int, state_BHKV: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype, the state that leaves [B, H, K, V] float32, and for the backward, float16 or empty:
    the states that enter each group and that leave the last one [B H, groups + 1, V, K], U and the true U [N, V, C]."""
    batch, length, _, width = v_BTGV.shape
    _, count, chunk, keys = ready.wide_4NCK.shape
    groups = triton.cdiv(length, GROUP)  # of tokens; v may be shared by some heads
    half = partial(torch.empty, device=v_BTGV.device, dtype=torch.float16)
    o_BTHV = torch.empty(batch, length, heads, width, device=v_BTGV.device, dtype=v_BTGV.dtype)
    last_BHKV = torch.empty(batch, heads, keys, width, device=v_BTGV.device, dtype=torch.float32)
    kept_GVK = half(batch * heads if keep else 0, groups + 1, width, keys)
    u_NVC, true_NVC = (half(count if keep else 0, width, chunk) for _ in range(2))
    outputs = (o_BTHV, u_NVC, true_NVC, kept_GVK, last_BHKV)
    _launch(ready, v_BTGV, state_BHKV, outputs, None, keep, reverse=False)
    return o_BTHV, last_BHKV, kept_GVK, u_NVC, true_NVC


def walk_back(
    ready: Prepared, do_BTHV: Tensor, dlast_BHKV: Tensor | None, largest_BH: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dV [B, T, H, V] in `dtype`, the gradient of the state that enters [B, H, K, V] float32, and float16, times the
    scale: those of the same states as in `walk` [B H, groups + 1, V, K], Z, and the true one [N, V, C]."""
    batch, length, heads, width = do_BTHV.shape
    _, count, chunk, keys = ready.wide_4NCK.shape
    groups = triton.cdiv(length, GROUP)
    half = partial(torch.empty, device=do_BTHV.device, dtype=torch.float16)
    dv_BTHV = torch.empty(do_BTHV.shape, device=do_BTHV.device, dtype=dtype)
    dfirst_BHKV = torch.empty(batch, heads, keys, width, device=do_BTHV.device, dtype=torch.float32)
    dkept_GVK = half(batch * heads, groups + 1, width, keys)
    z_NVC, true_NVC = (half(count, width, chunk) for _ in range(2))
    outputs = (dv_BTHV, z_NVC, true_NVC, dkept_GVK, dfirst_BHKV)
    _launch(ready, do_BTHV, dlast_BHKV, outputs, largest_BH, True, reverse=True)
    return dv_BTHV, dfirst_BHKV, dkept_GVK, z_NVC, true_NVC


def _launch(
    ready: Prepared,
    x_BTGV: Tensor,
    first_BHKV: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    largest_BH: Tensor | None,
    keep: bool,
    reverse: bool,
) -> None:
    chunk, keys = ready.wide_4NCK.shape[2:]
    y_BTHV, u_NVC, true_NVC, kept_GVK, last_BHKV = outputs
    batch, length, heads, width = y_BTHV.shape
    block = min(NARROW if batch * heads * width // NARROW < MANY else WIDE, width)
    _walk[(batch * heads * (width // block),)](
        ready.wide_4NCK,
        ready.square_4NCC,
        ready.g_NK,
        x_BTGV,
        last_BHKV if first_BHKV is None else first_BHKV,
        last_BHKV if largest_BH is None else largest_BH,
        y_BTHV,
        u_NVC,
        true_NVC,
        kept_GVK,
        last_BHKV,
        1.0,
        length,
        triton.cdiv(length, chunk),
        heads,
        heads // x_BTGV.shape[2],
        *strides(x_BTGV),
        *strides(y_BTHV),
        HAS_FIRST=first_BHKV is not None,
        KEEP=keep,
        REVERSE=reverse,
        GROUP_CHUNKS=GROUP // chunk,
        C=chunk,
        K=keys,
        V=width,
        BLOCK_V=block,
        PART=keys if reverse and block <= NARROW else min(PART, keys),
        STAGES=STAGES if chunk == 16 else STAGES_LONG,
        num_warps=block // VALUES_A_WARP,
    )


def largest_gradient(do_BTHV: Tensor, dlast_BHKV: Tensor | None) -> Tensor:
    """The largest size of dO and dS in each batch and head, float32 [B, H]."""
    batch, length, heads, width = do_BTHV.shape
    largest_BH = torch.zeros(batch, heads, device=do_BTHV.device, dtype=torch.float32)
    _largest[(batch * heads, triton.cdiv(length, ROWS))](
        do_BTHV,
        largest_BH if dlast_BHKV is None else dlast_BHKV,
        largest_BH,
        length,
        heads,
        *strides(do_BTHV),
        HAS_LAST=dlast_BHKV is not None,
        ROWS=ROWS,
        K=16 if dlast_BHKV is None else dlast_BHKV.shape[2],
        V=width,
        num_warps=4,
    )
    return largest_BH


@triton.jit
def power(largest):
    """The power of two that brings `largest` (float32, at least 0) to 2^-6 .. 2^-7; 2^100 at most."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(-6 - exponent, 100)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(
    x,
    last,
    largest,
    length,
    heads,
    stride_b,
    stride_t,
    stride_h,
    HAS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * ROWS
    inside_R1 = (start + tl.arange(0, ROWS) < length)[:, None]
    at_RV = rows(x, stride_b, stride_t, stride_h, lane // heads, lane % heads, start, ROWS, V)
    found = tl.max(tl.abs(tl.load(at_RV, mask=inside_R1, other=0.0).to(tl.float32)))
    if HAS_LAST:  # noqa: SIM102, since a constant decides about this one alone
        if tl.program_id(1) == 0:
            found = tl.maximum(found, tl.max(tl.abs(tl.load(tile(last, lane, K, V, V)))))
    tl.atomic_max(largest + lane, found, sem="relaxed")


@triton.jit
def _walk(
    wide_4NCK,
    square_4NCC,
    g_NK,
    x,
    first,
    largest,
    y,
    u_NVC,
    true_NVC,
    kept,
    last,
    scale,
    length,
    chunks,
    heads,
    repeats,
    x_stride_b,
    x_stride_t,
    x_stride_h,
    y_stride_b,
    y_stride_t,
    y_stride_h,
    HAS_FIRST: tl.constexpr,
    KEEP: tl.constexpr,
    REVERSE: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Blocks of one head run together: they read the same operands.
    blocks: tl.constexpr = V // BLOCK_V
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = lane // heads, lane % heads
    column = tl.program_id(0) % blocks * BLOCK_V
    groups = tl.cdiv(chunks, GROUP_CHUNKS)
    # W, R*, B^, K* as the chain goes: U comes from W and returns by B^, backwards Z from B^ by W.
    count = (tl.num_programs(0) // blocks).to(tl.int64) * chunks
    across_NCK = plane(wide_4NCK, 2 if REVERSE else 0, count, C * K)
    back_NCK = plane(wide_4NCK, 0 if REVERSE else 2, count, C * K)
    read_NCK = plane(wide_4NCK, 3 if REVERSE else 1, count, C * K)
    write_NCK = plane(wide_4NCK, 1 if REVERSE else 3, count, C * K)
    along_NCC = plane(square_4NCC, 3 if REVERSE else 2, count, C * C)
    value_V = column + tl.arange(0, BLOCK_V)
    key_K = tl.arange(0, PART)
    at_state_VK = lane * (K * V) + key_K[None, :] * V + value_V[:, None]
    at_kept_VK = lane * (groups + 1) * (K * V) + value_V[:, None] * K + key_K[None, :]
    if REVERSE:
        scale = power(tl.load(largest + lane))
    # The state in parts of its keys: the product that gives U, on which all waits, is a sum of shorter chains.
    parts: tl.constexpr = K // PART
    h = ()  # type: tuple
    for part in tl.static_range(parts):
        h_VK = tl.zeros((BLOCK_V, PART), tl.float32)
        if HAS_FIRST:
            h_VK += tl.load(first + at_state_VK + part * PART * V) * scale
        if KEEP:
            border = groups if REVERSE else 0
            at_VK = at_kept_VK + part * PART + tl.cast(border, tl.int64) * (K * V)
            tl.store(kept + at_VK, h_VK.to(tl.float16))
        h = h + (h_VK,)  # noqa: RUF005
    # Zeros that the compiler does not know, or it would make one chain of the sum again.
    nothing_VC = tl.zeros((BLOCK_V, C), tl.float32) + 0.0 * scale
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - step if REVERSE else step
        number = lane * chunks + chunk
        start = tl.cast(chunk, tl.int64) * C
        inside_1C = (start + tl.arange(0, C) < length)[None, :]
        at_x = columns(
            x + column, x_stride_b, x_stride_t, x_stride_h, batch, head // repeats, start, C, BLOCK_V
        )
        x_VC = tl.load(at_x, mask=inside_1C, other=0.0)
        loaded = ()  # type: tuple
        for part in tl.static_range(parts):
            key = part * PART
            loaded = loaded + (  # noqa: RUF005, since the kernel language does not unpack
                (
                    tl.load(g_NK + number * K + key + key_K),
                    tl.load(tile(across_NCK, number, C, K, PART) + key),
                    tl.load(tile(read_NCK, number, C, K, PART) + key),
                    tl.load(tile(back_NCK, number, C, K, PART) + key),
                    tl.load(tile(write_NCK, number, C, K, PART) + key),
                ),
            )
        p_CC = tl.load(tile(square_4NCC, number, C, C, C))
        if not REVERSE:
            p_CC = tl.trans(p_CC)
        # Forwards the scale is 1; without a product the compiler would not fetch x ahead, and the chain would wait.
        x_VC = (x_VC.to(tl.float32) * scale).to(tl.float16)
        # With U first the compiler lays all warps along the values, as the chain wants it.
        u_VC = tl.dot(h[0].to(tl.float16), tl.trans(loaded[0][1]), nothing_VC)
        y_VC = tl.dot(h[0].to(tl.float16), tl.trans(loaded[0][2]))
        for part in tl.static_range(1, parts):
            u_VC += tl.dot(h[part].to(tl.float16), tl.trans(loaded[part][1]), nothing_VC)
            y_VC = tl.dot(h[part].to(tl.float16), tl.trans(loaded[part][2]), y_VC)
        u_VC = u_VC.to(tl.float16)
        later = ()  # type: tuple
        for part in tl.static_range(parts):
            gate_K, _, _, back_CK, write_CK = loaded[part]
            h_VK = tl.dot(x_VC, write_CK, h[part] * gate_K[None, :])
            later = later + (tl.dot(u_VC, back_CK, h_VK),)  # noqa: RUF005
        h = later
        y_VC = tl.dot(x_VC, p_CC, y_VC)
        if REVERSE:
            y_VC = y_VC / scale
        at_y = columns(y + column, y_stride_b, y_stride_t, y_stride_h, batch, head, start, C, BLOCK_V)
        tl.store(at_y, y_VC.to(y.dtype.element_ty), mask=inside_1C)
        if KEEP:
            along_CC = tl.load(tile(along_NCC, number, C, C, C))
            if REVERSE:
                true_VC = tl.dot(u_VC, tl.load(tile(plane(square_4NCC, 1, count, C * C), number, C, C, C)))
                true_VC = tl.dot(x_VC, along_CC, true_VC).to(tl.float16)
            else:
                true_VC = tl.dot(x_VC, tl.trans(along_CC), u_VC.to(tl.float32)).to(tl.float16)
            at_VC = number * (C * V) + value_V[:, None] * C + tl.arange(0, C)[None, :]
            tl.store(u_NVC + at_VC, u_VC)
            tl.store(true_NVC + at_VC, true_VC)
            # Where this chunk ends, forwards, or starts, a group does.
            if REVERSE:
                at_border = chunk % GROUP_CHUNKS == 0
                border = chunk // GROUP_CHUNKS
            else:
                at_border = (chunk % GROUP_CHUNKS == GROUP_CHUNKS - 1) | (chunk == chunks - 1)
                border = chunk // GROUP_CHUNKS + 1
            if at_border:
                for part in tl.static_range(parts):
                    at_VK = at_kept_VK + part * PART + border.to(tl.int64) * (K * V)
                    tl.store(kept + at_VK, h[part].to(tl.float16))
    for part in tl.static_range(parts):
        tl.store(last + at_state_VK + part * PART * V, h[part] / scale)
