"""Matrix products that end in a squared activation or in its derivative, for Hopper: persistent, tiles by the bulk copy
engine.

Legend: N tokens, D model width (the summed dimension), I inner width, W = I / 32 words of signs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TILE_N, TILE_I, TILE_D, GROUP = 128, 128, 64, 8
PROGRAMS_A_PROCESSOR = 2  # one multiplies while the other writes
PARTS = 4  # of 32 columns, in which a tile is written: few registers and little shared memory wait for it


def activate(x_ND: Tensor, up_ID: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """max(h, slope h)^2 of h = x U^T, [N, I] in bfloat16, and the signs of h, a bit each, int32 [W, N] ([0, N] without
    a slope). The two say all of h that a gradient needs, in half the bytes."""
    tokens, inner = x_ND.shape[0], up_ID.shape[0]
    active_NI = x_ND.new_empty(tokens, inner)
    signs_WN = x_ND.new_empty(inner // 32 if slope else 0, tokens, dtype=torch.int32)
    _launch(x_ND, up_ID, active_NI, signs_WN, active_NI, slope, backward=False)
    return active_NI, signs_WN


def activate_backward(
    grad_ND: Tensor, down_DI: Tensor, active_NI: Tensor, signs_WN: Tensor, slope: float
) -> Tensor:
    """(grad W) times the derivative of max(h, slope h)^2 at h, [N, I]: 2 sqrt(square) where h is positive, and
    -2 slope sqrt(square) elsewhere."""
    out_NI = torch.empty_like(active_NI)
    _launch(grad_ND, down_DI, active_NI, signs_WN, out_NI, slope, backward=True)
    return out_NI


def _launch(
    rows_ND: Tensor,
    weight: Tensor,
    active_NI: Tensor,
    signs_WN: Tensor,
    out_NI: Tensor,
    slope: float,
    backward: bool,
) -> None:
    tokens, inner = out_NI.shape
    width = rows_ND.shape[1]
    processors = torch.cuda.get_device_properties(rows_ND.device).multi_processor_count
    tiles = triton.cdiv(tokens, TILE_N) * triton.cdiv(inner, TILE_I)
    part = [TILE_N, TILE_I // PARTS]
    _product[(min(PROGRAMS_A_PROCESSOR * processors, tiles),)](
        TensorDescriptor.from_tensor(rows_ND, [TILE_N, TILE_D]),
        TensorDescriptor.from_tensor(weight, [TILE_D, TILE_I] if backward else [TILE_I, TILE_D]),
        TensorDescriptor.from_tensor(active_NI, part),
        TensorDescriptor.from_tensor(out_NI, part),
        signs_WN,
        tokens,
        inner,
        width,
        slope,
        BACKWARD=backward,
        SLOPED=slope > 0,
        TILE_N=TILE_N,
        TILE_I=TILE_I,
        TILE_D=TILE_D,
        GROUP=GROUP,
        num_stages=3,
        num_warps=4,
    )


@triton.jit
def _tile(index, tiles_n, tiles_i, GROUP: tl.constexpr):
    """Tiles in groups of GROUP rows, so that neighbours share rows and weights in the cache."""
    group = index // (GROUP * tiles_i)
    first = group * GROUP
    size = min(tiles_n - first, GROUP)
    return first + (index % (GROUP * tiles_i)) % size, (index % (GROUP * tiles_i)) // size


@triton.jit
def _halves(sum_NI, HALF: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(sum_NI, (sum_NI.shape[0], 2, HALF)), (0, 2, 1)))


@triton.jit
def _finish(sum_NI, active, out, signs, n, i, tokens, slope, BACKWARD: tl.constexpr, SLOPED: tl.constexpr):
    """Write 32 columns of a tile; a word of signs holds those of a row."""
    bit_I = tl.arange(0, 32)[None, :]
    at_N = signs + (i // 32).to(tl.int64) * tokens + n + tl.arange(0, sum_NI.shape[0])
    if BACKWARD:
        factor_NI = 2 * tl.sqrt(active.load([n, i]).to(tl.float32))
        if SLOPED:
            negative_NI = (tl.load(at_N)[:, None] >> bit_I) & 1 == 0
            factor_NI = tl.where(negative_NI, -slope * factor_NI, factor_NI)
        out.store([n, i], (sum_NI * factor_NI).to(out.dtype))
    else:
        if SLOPED:
            tl.store(at_N, tl.sum((sum_NI > 0).to(tl.int32) << bit_I, 1))
        h_NI = tl.where(sum_NI > 0, sum_NI, slope * sum_NI)
        out.store([n, i], (h_NI * h_NI).to(out.dtype))


@triton.jit
def _product(
    rows,
    weight,
    active,
    out,
    signs,
    tokens,
    width_i,
    width_d,
    slope,
    BACKWARD: tl.constexpr,
    SLOPED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_n, tiles_i = tl.cdiv(tokens, TILE_N), tl.cdiv(width_i, TILE_I)
    steps = tl.cdiv(width_d, TILE_D)
    QUARTER: tl.constexpr = TILE_I // 4
    for index in tl.range(tl.program_id(0), tiles_n * tiles_i, tl.num_programs(0), flatten=True):
        tile_n, tile_i = _tile(index, tiles_n, tiles_i, GROUP)
        n, i = tile_n * TILE_N, tile_i * TILE_I
        sum_NI = tl.zeros((TILE_N, TILE_I), dtype=tl.float32)
        for step in range(steps):
            d = step * TILE_D
            row_tile = rows.load([n, d])
            if BACKWARD:
                sum_NI = tl.dot(row_tile, weight.load([d, i]), sum_NI)
            else:
                sum_NI = tl.dot(row_tile, weight.load([i, d]).T, sum_NI)
        left, right = _halves(sum_NI, TILE_I // 2)
        first, second = _halves(left, QUARTER)
        _finish(first, active, out, signs, n, i, tokens, slope, BACKWARD, SLOPED)
        _finish(second, active, out, signs, n, i + QUARTER, tokens, slope, BACKWARD, SLOPED)
        third, fourth = _halves(right, QUARTER)
        _finish(third, active, out, signs, n, i + 2 * QUARTER, tokens, slope, BACKWARD, SLOPED)
        _finish(fourth, active, out, signs, n, i + 3 * QUARTER, tokens, slope, BACKWARD, SLOPED)
