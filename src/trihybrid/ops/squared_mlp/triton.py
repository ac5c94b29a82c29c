"""Matrix products that end in a squared activation or in its derivative, for Hopper: persistent, tiles by the bulk copy
engine.

Legend: N tokens, D model width (the summed dimension), I inner width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TILE_N, TILE_I, TILE_D, GROUP = 128, 256, 64, 8
HALF_I = TILE_I // 2  # the epilogue writes half a tile at a time, so that the other half's registers are free


def activate(x_ND: Tensor, up_ID: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """h = x U^T and max(h, slope h)^2, both [N, I] in bfloat16; the square is taken of the rounded h."""
    inner_NI = x_ND.new_empty(x_ND.shape[0], up_ID.shape[0])
    active_NI = torch.empty_like(inner_NI)
    _launch(x_ND, up_ID, inner_NI, active_NI, slope, backward=False)
    return inner_NI, active_NI


def activate_backward(grad_ND: Tensor, down_DI: Tensor, inner_NI: Tensor, slope: float) -> Tensor:
    """(grad W) times the derivative of max(h, slope h)^2 at h, [N, I]."""
    out_NI = torch.empty_like(inner_NI)
    _launch(grad_ND, down_DI, inner_NI, out_NI, slope, backward=True)
    return out_NI


def _launch(
    rows_ND: Tensor, weight: Tensor, inner_NI: Tensor, out_NI: Tensor, slope: float, backward: bool
) -> None:
    tokens, inner = inner_NI.shape
    width = rows_ND.shape[1]
    processors = torch.cuda.get_device_properties(rows_ND.device).multi_processor_count
    tiles = triton.cdiv(tokens, TILE_N) * triton.cdiv(inner, TILE_I)
    weight_tile = [TILE_D, TILE_I] if backward else [TILE_I, TILE_D]
    _product[(min(processors, tiles),)](
        TensorDescriptor.from_tensor(rows_ND, [TILE_N, TILE_D]),
        TensorDescriptor.from_tensor(weight, weight_tile),
        TensorDescriptor.from_tensor(inner_NI, [TILE_N, HALF_I]),
        TensorDescriptor.from_tensor(out_NI, [TILE_N, HALF_I]),
        tokens,
        inner,
        width,
        slope,
        BACKWARD=backward,
        TILE_N=TILE_N,
        TILE_I=TILE_I,
        TILE_D=TILE_D,
        GROUP=GROUP,
        num_stages=3,
        num_warps=8,
    )


@triton.jit
def _tile(index, tiles_n, tiles_i, GROUP: tl.constexpr):
    """Tiles in groups of GROUP rows, so that neighbours share rows and weights in the cache."""
    group = index // (GROUP * tiles_i)
    first = group * GROUP
    size = min(tiles_n - first, GROUP)
    return first + (index % (GROUP * tiles_i)) % size, (index % (GROUP * tiles_i)) // size


@triton.jit
def _finish(sum_NI, inner, out, n, i, slope, BACKWARD: tl.constexpr):
    if BACKWARD:
        h = inner.load([n, i]).to(tl.float32)
        out.store([n, i], (sum_NI * 2 * tl.where(h > 0, h, slope * slope * h)).to(out.dtype))
    else:
        rounded = sum_NI.to(out.dtype)
        inner.store([n, i], rounded)
        h = rounded.to(tl.float32)
        h = tl.where(h > 0, h, slope * h)
        out.store([n, i], (h * h).to(out.dtype))


@triton.jit
def _product(
    rows,
    weight,
    inner,
    out,
    tokens,
    width_i,
    width_d,
    slope,
    BACKWARD: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_n, tiles_i = tl.cdiv(tokens, TILE_N), tl.cdiv(width_i, TILE_I)
    steps = tl.cdiv(width_d, TILE_D)
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
        halves = tl.permute(tl.reshape(sum_NI, (TILE_N, 2, TILE_I // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _finish(left, inner, out, n, i, slope, BACKWARD)
        _finish(right, inner, out, n, i + TILE_I // 2, slope, BACKWARD)
