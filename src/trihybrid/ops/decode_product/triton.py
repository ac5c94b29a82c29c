"""The kernels of `decode_product` for a row alone, and of `raised`; `several` has those for more rows.

Each program works on blocks of outputs. Those of a stream's product all make the product's input anew, which is cheap
beside their part of the weights, and the first one writes the stream; a program's first weights are on their way before
the former kernel has ended.

All tiles have two axes, the second one that of the inputs, so that weights are summed in the registers into which they
were loaded.

Legend: D width of the stream, rounded up to WIDE; O outputs of a block; I inputs of a step; C channels of a block; K
ranks, rounded up to RANKS.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.decode_product import Before, Finish
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
from trihybrid.ops.decode_product.several import launch_several, launch_several_normed
from trihybrid.ops.decode_product.sizes import RAISED, normed_sizes, product_sizes
from trihybrid.ops.early import admit_next, await_former, early

MOST_GROUPS = 4


def launch_product(x_BI: Tensor, weight_OI: Tensor) -> Tensor:
    """As `decode_product.product`."""
    rows, inputs = x_BI.shape
    if rows > 1:
        return launch_several(x_BI, weight_OI, Finish())
    outputs, sizes, soon = weight_OI.shape[0], product_sizes(inputs), early(x_BI.device)
    o_BO = torch.empty((rows, outputs), dtype=x_BI.dtype, device=x_BI.device)
    _product[(triton.cdiv(outputs, sizes.block),)](
        x_BI, weight_OI, o_BO, inputs, outputs, weight_OI.stride(0), BLOCK=sizes.block,
        STEP=min(sizes.step, triton.next_power_of_2(inputs)), EARLY=soon, num_warps=sizes.warps, launch_pdl=soon,
    )  # fmt: skip
    return o_BO


def launch_normed(x_BD: Tensor, weight_OD: Tensor, before: Before, finish: Finish) -> tuple[Tensor, Tensor]:
    """As `decode_product.normed_product`."""
    if len(x_BD) > 1:
        return launch_several_normed(x_BD, weight_OD, before, finish)
    own, width, soon = outputs_of(finish, x_BD, weight_OD), x_BD.shape[1], early(x_BD.device)
    outputs = own.o_BF.shape[1]
    sizes = normed_sizes(width, outputs, finish.kind)
    processors = torch.cuda.get_device_properties(x_BD.device).multi_processor_count
    programs = min(triton.cdiv(outputs, sizes.block), sizes.programs * processors)
    after_BD = torch.empty_like(x_BD) if moves(before) else x_BD
    pointers, epsilons, flags = parts_of(before, x_BD)
    _normed[(programs,)](
        x_BD, *pointers, *own.pointers, after_BD, own.o_BF, width, outputs, *epsilons, *own.numbers, **flags,
        **own.flags, WIDE=triton.next_power_of_2(width), BLOCK=sizes.block, EARLY=soon, num_warps=sizes.warps,
        launch_pdl=soon,
    )  # fmt: skip
    return after_BD, own.o_BF


def launch_raised(x_BP: Tensor, first: int, weights: Sequence[Tensor]) -> Tensor:
    """As `decode_product.raised`."""
    assert 1 <= len(weights) <= MOST_GROUPS
    rows = x_BP.shape[0]
    shapes = [tuple(weight.shape) for weight in weights]
    channels, block = sum(shape[1] for shape in shapes), RAISED.block
    o_BC = torch.empty((rows, channels), dtype=x_BP.dtype, device=x_BP.device)
    shapes += [(0, 0)] * (MOST_GROUPS - len(shapes))
    blocks = sum(triton.cdiv(shape[1], block) for shape in shapes)
    soon = early(x_BP.device)
    _raised[(blocks, rows)](
        x_BP, weights[0], o_BC, x_BP.stride(0), first, channels, *(size for shape in shapes for size in shape),
        RANKS=triton.next_power_of_2(max(shape[0] for shape in shapes)),
        BLOCK=block, EARLY=soon, num_warps=RAISED.warps, launch_pdl=soon,
    )  # fmt: skip
    return o_BC


@triton.jit
def _product(
    x, weight, o, inputs, outputs, weight_o, BLOCK: tl.constexpr, STEP: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    step_1I, wide_O = tl.arange(0, STEP)[None, :], tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_O1 = (wide_O < outputs)[:, None]
    weight_OI = weight + wide_O.to(tl.int64)[:, None] * weight_o + step_1I
    next_OI = tl.load(weight_OI, mask=in_O1 & (step_1I < inputs), other=0.0)
    admit_next(EARLY)
    await_former(EARLY)
    # Over the steps first, and over the inputs of a step at the end.
    sum_OI = tl.zeros((BLOCK, STEP), tl.float32)
    for start in range(0, inputs, STEP):
        w_OI = next_OI.to(tl.float32)
        next_1I = start + STEP + step_1I
        next_OI = tl.load(weight_OI + start + STEP, mask=in_O1 & (next_1I < inputs), other=0.0)
        at_1I = start + step_1I
        sum_OI += w_OI * tl.load(x + at_1I, mask=at_1I < inputs, other=0.0).to(tl.float32)
    tl.store(o + wide_O, tl.sum(sum_OI, 1).to(o.dtype.element_ty), mask=wide_O < outputs)


@triton.jit
def _normed(
    x, y, y_weight, scalar, x_weight, weight, half, other, after, o, width, outputs, y_epsilon, x_epsilon,
    cap, tanh_from, sigmoid_from,
    ADDED: tl.constexpr, Y_NORMED: tl.constexpr, Y_WEIGHT: tl.constexpr, SCALED: tl.constexpr, NORMED: tl.constexpr,
    WEIGHT: tl.constexpr, KIND: tl.constexpr, SILU: tl.constexpr, CAPPED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wide_1D, block_O = tl.arange(0, WIDE)[None, :], tl.arange(0, BLOCK)
    in_1D, first = wide_1D < width, tl.program_id(0) * BLOCK
    next_OD = _tile(weight, first, outputs, width, block_O, wide_1D, in_1D)
    if KIND == GATED:
        next_up_OD = _tile(half, first, outputs, width, block_O, wide_1D, in_1D)
    y_weight_1D, x_weight_1D = (
        gains(y_weight, wide_1D, in_1D, Y_WEIGHT),
        gains(x_weight, wide_1D, in_1D, WEIGHT),
    )
    factor = factor_of(scalar, SCALED)
    admit_next(EARLY)
    await_former(EARLY)
    x_1D = moved(
        x, y, y_weight_1D, factor, wide_1D, in_1D, width, y_epsilon, ADDED, Y_NORMED, Y_WEIGHT, SCALED
    )
    if ADDED or SCALED:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(after + wide_1D, x_1D.to(after.dtype.element_ty), mask=in_1D)
    x_1D = normed(x_1D, x_weight_1D, width, x_epsilon, NORMED, WEIGHT)
    stride = tl.num_programs(0) * BLOCK
    for start in range(first, outputs, stride):
        wide_O = start + block_O
        in_O = wide_O < outputs
        w_OD = next_OD.to(tl.float32)
        next_OD = _tile(weight, start + stride, outputs, width, block_O, wide_1D, in_1D)
        if KIND == GATED:
            up_OD = next_up_OD.to(tl.float32)
            next_up_OD = _tile(half, start + stride, outputs, width, block_O, wide_1D, in_1D)
        o_O = tl.sum(w_OD * x_1D, 1)
        up_O, other_O = o_O, o_O
        if KIND == GATED:
            up_O = tl.sum(up_OD * x_1D, 1)
        if KIND == TIMES:
            other_O = tl.load(other + wide_O, mask=in_O, other=0.0).to(tl.float32)
        o_O = finished(o_O, up_O, other_O, wide_O, cap, tanh_from, sigmoid_from, KIND, SILU, CAPPED)
        tl.store(o + wide_O, o_O.to(o.dtype.element_ty), mask=in_O)


@triton.jit
def _tile(weight, start, outputs, width, block_O, wide_1D, in_1D):
    """Rows of a weight matrix, zeros behind its end."""
    wide_O = start + block_O
    at_OD = wide_O.to(tl.int64)[:, None] * width + wide_1D
    return tl.load(weight + at_OD, mask=(wide_O < outputs)[:, None] & in_1D, other=0.0)


@triton.jit
def _raised(
    x, weight, o, x_b, first, channels, ranks_0, channels_0, ranks_1, channels_1, ranks_2, channels_2, ranks_3,
    channels_3, RANKS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    block, start = tl.program_id(0), 0
    ranks, own = ranks_0, channels_0
    # Past the groups before the one that this block is in.
    blocks = tl.cdiv(channels_0, BLOCK)
    if block >= blocks:
        block -= blocks
        weight += ranks_0 * channels_0
        first, start, ranks, own = first + ranks_0, start + channels_0, ranks_1, channels_1
        blocks = tl.cdiv(channels_1, BLOCK)
        if block >= blocks:
            block -= blocks
            weight += ranks_1 * channels_1
            first, start, ranks, own = first + ranks_1, start + channels_1, ranks_2, channels_2
            blocks = tl.cdiv(channels_2, BLOCK)
            if block >= blocks:
                block -= blocks
                weight += ranks_2 * channels_2
                first, start, ranks, own = first + ranks_2, start + channels_2, ranks_3, channels_3
    rank_K1, wide_C = tl.arange(0, RANKS)[:, None], block * BLOCK + tl.arange(0, BLOCK)
    in_K1, in_C = rank_K1 < ranks, wide_C < own
    w_KC = tl.load(weight + rank_K1 * own + wide_C[None, :], mask=in_K1 & in_C[None, :], other=0.0).to(
        tl.float32
    )
    admit_next(EARLY)
    await_former(EARLY)
    row = tl.program_id(1)
    x_K1 = tl.load(x + row * x_b + first + rank_K1, mask=in_K1, other=0.0)
    o_C = tl.sum(x_K1.to(tl.float32) * w_KC, 0)
    tl.store(o + row * channels + start + wide_C, o_C.to(o.dtype.element_ty), mask=in_C)
