"""The kernels of `decode_product` for several rows: tensor cores, whose tiles hold 16 outputs and 8 rows.

A row alone is summed by the lanes that loaded its weights; of several, each sum would have to be gathered from all
lanes. Here warps take parts of the inputs side by side and their sums are added at the end. The product's input is a
launch of its own: to make it anew in every program costs as much as the product.

Legend: B rows, R all ROWS of a tile; D width of the stream, rounded up to WIDE; O outputs of a block; P parts of a
step; I inputs of a part.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.decode_product import MOST_ROWS, Before, Finish
from trihybrid.ops.decode_product.around import (
    GATED,
    TIMES,
    factor_of,
    finished,
    gains,
    moved,
    moves,
    normed,
    outputs_of,
    parts_of,
)
from trihybrid.ops.decode_product.sizes import FEWEST, several_sizes
from trihybrid.ops.early import admit_next, await_former, early


def launch_several_normed(
    x_BD: Tensor, weight_OD: Tensor, before: Before, finish: Finish
) -> tuple[Tensor, Tensor]:
    """As `decode_product.normed_product`."""
    after_BD, z_BD = _launch_stream(x_BD, before)
    return after_BD, launch_several(z_BD, weight_OD, finish)


def launch_several(x_BI: Tensor, weight_OI: Tensor, finish: Finish) -> Tensor:
    """The finished product x W^T, [B, F]."""
    own, (rows, inputs), soon = outputs_of(finish, x_BI, weight_OI), x_BI.shape, early(x_BI.device)
    outputs = own.o_BF.shape[1]
    sizes = several_sizes(inputs, outputs, finish.kind)
    # A part is no wider than the inputs ask for, and a tensor core takes no fewer than FEWEST.
    part = max(FEWEST, min(sizes.step, triton.next_power_of_2(triton.cdiv(inputs, sizes.warps))))
    _several[(triton.cdiv(outputs, sizes.block),)](
        x_BI, *own.pointers, own.o_BF, inputs, outputs, x_BI.stride(0), weight_OI.stride(0), own.other_b, rows,
        *own.numbers, **own.flags, ROWS=MOST_ROWS, BLOCK=sizes.block, PARTS=sizes.warps,
        STEP=part, EARLY=soon, num_warps=sizes.warps, launch_pdl=soon,
    )  # fmt: skip
    return own.o_BF


def _launch_stream(x_BD: Tensor, before: Before) -> tuple[Tensor, Tensor]:
    """The stream x' and the product's input z."""
    if not moves(before) and before.gain is None:
        return x_BD, x_BD
    (rows, width), soon = x_BD.shape, early(x_BD.device)
    after_BD = torch.empty_like(x_BD) if moves(before) else x_BD
    z_BD = after_BD if before.gain is None else torch.empty_like(x_BD)
    pointers, epsilons, flags = parts_of(before, x_BD)
    _stream[(rows,)](
        x_BD, *pointers, after_BD, z_BD, width, *epsilons, **flags, WIDE=triton.next_power_of_2(width), EARLY=soon,
        num_warps=8, launch_pdl=soon,
    )  # fmt: skip
    return after_BD, z_BD


@triton.jit
def _stream(
    x, y, y_weight, scalar, x_weight, after, z, width, y_epsilon, x_epsilon,
    ADDED: tl.constexpr, Y_NORMED: tl.constexpr, Y_WEIGHT: tl.constexpr, SCALED: tl.constexpr, NORMED: tl.constexpr,
    WEIGHT: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wide_1D = tl.arange(0, WIDE)[None, :]
    in_1D, at_1D = wide_1D < width, tl.program_id(0) * width + wide_1D
    y_weight_1D, x_weight_1D = (
        gains(y_weight, wide_1D, in_1D, Y_WEIGHT),
        gains(x_weight, wide_1D, in_1D, WEIGHT),
    )
    factor = factor_of(scalar, SCALED)
    admit_next(EARLY)
    await_former(EARLY)
    x_1D = moved(x, y, y_weight_1D, factor, at_1D, in_1D, width, y_epsilon, ADDED, Y_NORMED, Y_WEIGHT, SCALED)
    if ADDED or SCALED:
        tl.store(after + at_1D, x_1D.to(after.dtype.element_ty), mask=in_1D)
    if NORMED:
        z_1D = normed(x_1D, x_weight_1D, width, x_epsilon, NORMED, WEIGHT)
        tl.store(z + at_1D, z_1D.to(z.dtype.element_ty), mask=in_1D)


@triton.jit
def _several(
    x, weight, half, other, o, inputs, outputs, x_b, weight_o, other_b, rows, cap, tanh_from, sigmoid_from,
    KIND: tl.constexpr, SILU: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wide_O, row_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS)
    own_PI = tl.arange(0, PARTS)[:, None] * STEP + tl.arange(0, STEP)[None, :]
    own_POI, own_PIR = own_PI[:, None, :], own_PI[:, :, None]
    in_O = wide_O < outputs
    in_1O1, in_11R = in_O[None, :, None], (row_R < rows)[None, None, :]
    at_POI = wide_O.to(tl.int64)[None, :, None] * weight_o + own_POI
    next_POI = tl.load(weight + at_POI, mask=in_1O1 & (own_POI < inputs), other=0.0)
    if KIND == GATED:
        next_up_POI = tl.load(half + at_POI, mask=in_1O1 & (own_POI < inputs), other=0.0)
    admit_next(EARLY)
    await_former(EARLY)
    sum_POR = tl.zeros((PARTS, BLOCK, ROWS), tl.float32)
    up_POR = tl.zeros((PARTS, BLOCK, ROWS), tl.float32)
    for start in range(0, inputs, PARTS * STEP):
        w_POI = next_POI
        in_POI = in_1O1 & (start + PARTS * STEP + own_POI < inputs)
        next_POI = tl.load(weight + at_POI + start + PARTS * STEP, mask=in_POI, other=0.0)
        in_PIR = in_11R & (start + own_PIR < inputs)
        x_PIR = tl.load(x + row_R[None, None, :] * x_b + start + own_PIR, mask=in_PIR, other=0.0)
        sum_POR = tl.dot(w_POI, x_PIR, sum_POR)
        if KIND == GATED:
            u_POI = next_up_POI
            next_up_POI = tl.load(half + at_POI + start + PARTS * STEP, mask=in_POI, other=0.0)
            up_POR = tl.dot(u_POI, x_PIR, up_POR)
    o_OR, wide_O1 = tl.sum(sum_POR, 0), wide_O[:, None]
    in_OR = in_O[:, None] & (row_R < rows)[None, :]
    other_OR = o_OR
    if KIND == TIMES:
        other_OR = tl.load(other + row_R[None, :] * other_b + wide_O1, mask=in_OR, other=0.0).to(tl.float32)
    up_OR = tl.sum(up_POR, 0)
    o_OR = finished(o_OR, up_OR, other_OR, wide_O1, cap, tanh_from, sigmoid_from, KIND, SILU, CAPPED)
    tl.store(o + row_R[None, :] * outputs + wide_O1, o_OR.to(o.dtype.element_ty), mask=in_OR)
