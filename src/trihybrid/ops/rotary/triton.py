"""The kernels of `normed_rotation`: tiles of whole heads, so that norm and rotation need no second pass.

The rotation is linear, so the norm's factor and the gain come after it. A channel's partner in its pair is loaded again
rather than exchanged between threads: it is in the cache.

Legend: R heads of a tile, of the B T H that lie one behind the other; N head width.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # channels
PROGRAMS_A_PROCESSOR = 32


def forward(
    x_BTHN: Tensor, gain_H: Tensor | None, cosine_BT1F: Tensor, sine_BT1F: Tensor, epsilon: float
) -> Tensor:
    """rotate(gain rms(x)), [B, T, H, N]. All contiguous; float32 gain."""
    heads, width = x_BTHN.shape[2:]
    count, pairs = x_BTHN.numel() // width, cosine_BT1F.shape[-1]
    y_BTHN = torch.empty_like(x_BTHN)
    if count:
        _forward[(triton.cdiv(count, TILE // width),)](
            x_BTHN, gain_H, cosine_BT1F, sine_BT1F, y_BTHN, count, epsilon, HAS_GAIN=gain_H is not None, HEADS=heads,
            WIDTH=width, PAIRS=pairs, ALIGN=math.gcd(pairs, 8), ROWS=TILE // width, num_warps=4,
        )  # fmt: skip
    return y_BTHN


def backward(
    grad_BTHN: Tensor,
    x_BTHN: Tensor,
    gain_H: Tensor | None,
    cosine_BT1F: Tensor,
    sine_BT1F: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the gain (float32; [0] where there is none). All contiguous."""
    heads, width = x_BTHN.shape[2:]
    count, pairs, rows = x_BTHN.numel() // width, cosine_BT1F.shape[-1], TILE // width
    processors = torch.cuda.get_device_properties(x_BTHN.device).multi_processor_count
    tiles = triton.cdiv(count, rows)
    # A multiple of H, so that a row of a program's tiles is always of the same head.
    programs = triton.cdiv(min(PROGRAMS_A_PROCESSOR * processors, tiles), heads) * heads
    dx_BTHN = torch.empty_like(x_BTHN)
    slots = 0 if gain_H is None else programs * rows
    parts = torch.empty(slots, device=x_BTHN.device, dtype=torch.float32)
    if count:
        _backward[(programs,)](
            grad_BTHN, x_BTHN, gain_H, cosine_BT1F, sine_BT1F, dx_BTHN, parts, count, epsilon,
            HAS_GAIN=gain_H is not None, HEADS=heads, WIDTH=width, PAIRS=pairs, ALIGN=math.gcd(pairs, 8), ROWS=rows,
            num_warps=4,
        )  # fmt: skip
    return dx_BTHN, parts if gain_H is None else parts.view(-1, heads).sum(0)


@triton.jit
def _turned(
    x_RN, x, cosine, sine, row_R, inside_R, DIRECTION: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows x_RN, which are those at `x`, rotated forwards (DIRECTION 1) or back (-1)."""
    wide_N = tl.arange(0, WIDTH)
    lower_N = wide_N < PAIRS
    # The compiler does not see that both run on in steps of one, and would load channel by channel.
    angle_N = tl.max_contiguous(tl.multiple_of(tl.where(lower_N, wide_N, wide_N - PAIRS), ALIGN), ALIGN)
    partner_N = tl.where(lower_N, wide_N + PAIRS, wide_N - PAIRS)
    partner_N = tl.max_contiguous(tl.multiple_of(partner_N, ALIGN), ALIGN)
    turns_RN = inside_R[:, None] & (wide_N < 2 * PAIRS)[None, :]
    at_RN = (row_R // HEADS).to(tl.int64)[:, None] * PAIRS + angle_N[None, :]
    cosine_RN = tl.load(cosine + at_RN, mask=turns_RN, other=1.0).to(tl.float32)
    sine_RN = tl.load(sine + at_RN, mask=turns_RN, other=0.0).to(tl.float32)
    at_RN = row_R.to(tl.int64)[:, None] * WIDTH + partner_N[None, :]
    partner_RN = tl.load(x + at_RN, mask=turns_RN, other=0.0).to(tl.float32)
    sign_N = tl.where(lower_N, 1.0, -1.0) * DIRECTION
    return x_RN * cosine_RN + partner_RN * sine_RN * sign_N[None, :]


@triton.jit
def _forward(
    x, gain, cosine, sine, y, count, epsilon, HAS_GAIN: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < count
    at_RN = row_R.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x_RN = tl.load(x + at_RN, mask=inside_R[:, None], other=0.0).to(tl.float32)
    factor_R = tl.rsqrt(tl.sum(x_RN * x_RN, 1) / WIDTH + epsilon)
    if HAS_GAIN:
        factor_R = factor_R * tl.load(gain + row_R % HEADS)
    if PAIRS > 0:
        x_RN = _turned(x_RN, x, cosine, sine, row_R, inside_R, 1, HEADS, WIDTH, PAIRS, ALIGN)
    tl.store(y + at_RN, (x_RN * factor_R[:, None]).to(y.dtype.element_ty), mask=inside_R[:, None])


@triton.jit
def _backward(
    grad, x, gain, cosine, sine, dx, parts, count, epsilon, HAS_GAIN: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    slot_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sum_R = tl.zeros((ROWS,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row_R = tile * ROWS + tl.arange(0, ROWS)
        inside_R = row_R < count
        at_RN = row_R.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        x_RN = tl.load(x + at_RN, mask=inside_R[:, None], other=0.0).to(tl.float32)
        grad_RN = tl.load(grad + at_RN, mask=inside_R[:, None], other=0.0).to(tl.float32)
        if PAIRS > 0:
            grad_RN = _turned(grad_RN, grad, cosine, sine, row_R, inside_R, -1, HEADS, WIDTH, PAIRS, ALIGN)
        factor_R = tl.rsqrt(tl.sum(x_RN * x_RN, 1) / WIDTH + epsilon)
        normed_RN = x_RN * factor_R[:, None]
        along_R = tl.sum(grad_RN * normed_RN, 1)
        if HAS_GAIN:
            sum_R += along_R
            factor_R = factor_R * tl.load(gain + slot_R % HEADS)
        dx_RN = (grad_RN - normed_RN * (along_R / WIDTH)[:, None]) * factor_R[:, None]
        tl.store(dx + at_RN, dx_RN.to(dx.dtype.element_ty), mask=inside_R[:, None])
    if HAS_GAIN:
        tl.store(parts + slot_R, sum_R)
