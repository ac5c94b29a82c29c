"""The kernels of `exclude_own_value`: a program holds a tile of values and walks over the query heads that read them.

Legend: R values of a tile, of the B T G that lie one behind the other; QUERIES = H / G; N head width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # channels
FLOOR = tl.constexpr(1e-12)  # least length that a value is divided by


def forward(o_BTHN: Tensor, v_BTGN: Tensor) -> Tensor:
    """o - (o . u) u, [B, T, H, N]. All contiguous."""
    y_BTHN = torch.empty_like(o_BTHN)
    groups, width = v_BTGN.shape[2:]
    count, rows = v_BTGN.numel() // width, TILE // width
    if count:
        _forward[(triton.cdiv(count, rows),)](
            o_BTHN,
            v_BTGN,
            y_BTHN,
            count,
            QUERIES=o_BTHN.shape[2] // groups,
            WIDTH=width,
            ROWS=rows,
            num_warps=4,
        )
    return y_BTHN


def backward(grad_BTHN: Tensor, o_BTHN: Tensor, v_BTGN: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of o and v. All contiguous."""
    do_BTHN, dv_BTGN = torch.empty_like(o_BTHN), torch.empty_like(v_BTGN)
    groups, width = v_BTGN.shape[2:]
    count, rows = v_BTGN.numel() // width, TILE // width
    if count:
        _backward[(triton.cdiv(count, rows),)](
            grad_BTHN, o_BTHN, v_BTGN, do_BTHN, dv_BTGN, count, QUERIES=o_BTHN.shape[2] // groups, WIDTH=width,
            ROWS=rows, num_warps=4,
        )  # fmt: skip
    return do_BTHN, dv_BTGN


@triton.jit
def _forward(o, v, y, count, QUERIES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wide_N = tl.arange(0, WIDTH)
    inside_R1 = (row_R < count)[:, None]
    v_RN = tl.load(v + row_R[:, None] * WIDTH + wide_N[None, :], mask=inside_R1, other=0.0).to(tl.float32)
    length_R = tl.maximum(tl.sqrt(tl.sum(v_RN * v_RN, 1)), FLOOR)
    own_RN = v_RN / length_R[:, None]
    for query in tl.static_range(QUERIES):
        at_RN = (row_R * QUERIES + query)[:, None] * WIDTH + wide_N[None, :]
        o_RN = tl.load(o + at_RN, mask=inside_R1, other=0.0).to(tl.float32)
        y_RN = o_RN - tl.sum(o_RN * own_RN, 1)[:, None] * own_RN
        tl.store(y + at_RN, y_RN.to(y.dtype.element_ty), mask=inside_R1)


@triton.jit
def _backward(grad, o, v, do, dv, count, QUERIES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wide_N = tl.arange(0, WIDTH)
    inside_R1 = (row_R < count)[:, None]
    at_v_RN = row_R[:, None] * WIDTH + wide_N[None, :]
    v_RN = tl.load(v + at_v_RN, mask=inside_R1, other=0.0).to(tl.float32)
    length_R = tl.sqrt(tl.sum(v_RN * v_RN, 1))
    floored_R = tl.maximum(length_R, FLOOR)
    own_RN = v_RN / floored_R[:, None]
    down_RN = tl.zeros((ROWS, WIDTH), tl.float32)
    for query in tl.static_range(QUERIES):
        at_RN = (row_R * QUERIES + query)[:, None] * WIDTH + wide_N[None, :]
        o_RN = tl.load(o + at_RN, mask=inside_R1, other=0.0).to(tl.float32)
        grad_RN = tl.load(grad + at_RN, mask=inside_R1, other=0.0).to(tl.float32)
        read_R, asked_R = tl.sum(o_RN * own_RN, 1), tl.sum(grad_RN * own_RN, 1)
        do_RN = grad_RN - asked_R[:, None] * own_RN
        tl.store(do + at_RN, do_RN.to(do.dtype.element_ty), mask=inside_R1)
        down_RN -= read_R[:, None] * grad_RN + asked_R[:, None] * o_RN
    # A value shorter than the floor is divided by a constant.
    along_R = tl.where(length_R > FLOOR, tl.sum(down_RN * own_RN, 1), 0.0)
    dv_RN = (down_RN - along_R[:, None] * own_RN) / floored_R[:, None]
    tl.store(dv + at_v_RN, dv_RN.to(dv.dtype.element_ty), mask=inside_R1)
