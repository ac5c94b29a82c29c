"""The kernels of `gated_gelu`, in float32 from what they read to what they write.

Legend: R elements of a program, or rows; F channels of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) up, contiguous, for tensors of one shape. Rows may lie apart; other strides are copied."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    count = gate.numel()
    if count:
        gate_RF, up_RF = _rows(gate), _rows(up)
        _forward[(triton.cdiv(count, TILE),)](
            gate_RF,
            up_RF,
            h,
            count,
            gate_RF.shape[1],
            gate_RF.stride(0),
            up_RF.stride(0),
            TILE=TILE,
            num_warps=4,
        )
    return h


def _rows(x: Tensor) -> Tensor:
    x = torch.atleast_1d(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up. All contiguous."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    count = gate.numel()
    _backward[(triton.cdiv(count, TILE),)](grad, gate, up, grad_gate, grad_up, count, TILE=TILE, num_warps=4)
    return grad_gate, grad_up


@triton.jit
def _share(x):
    """(1 + tanh(z)) / 2 = 1 / (1 + e^-2z) of the GELU's z(x), and dz/dx."""
    square = x * x
    z = 0.7978845608028654 * x * (1 + 0.044715 * square)
    slope = 0.7978845608028654 * (1 + 3 * 0.044715 * square)
    return 1 / (1 + tl.exp(-2 * z)), slope


@triton.jit
def _forward(gate, up, h, count, width, gate_stride, up_stride, TILE: tl.constexpr):
    place_R = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there_R, row_R, column_R = place_R < count, place_R // width, place_R % width
    x_R = tl.load(gate + row_R * gate_stride + column_R, there_R, other=0.0).to(tl.float32)
    u_R = tl.load(up + row_R * up_stride + column_R, there_R, other=0.0).to(tl.float32)
    share_R, _ = _share(x_R)
    tl.store(h + place_R, (x_R * share_R * u_R).to(h.dtype.element_ty), there_R)


@triton.jit
def _backward(grad, gate, up, grad_gate, grad_up, count, TILE: tl.constexpr):
    place_R = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there_R = place_R < count
    g_R = tl.load(grad + place_R, there_R, other=0.0).to(tl.float32)
    x_R = tl.load(gate + place_R, there_R, other=0.0).to(tl.float32)
    u_R = tl.load(up + place_R, there_R, other=0.0).to(tl.float32)
    share_R, slope_R = _share(x_R)
    # d (x s) / dx = s + x 2 s (1 - s) dz/dx
    change_R = share_R + 2 * x_R * share_R * (1 - share_R) * slope_R
    tl.store(grad_gate + place_R, (g_R * u_R * change_R).to(grad_gate.dtype.element_ty), there_R)
    tl.store(grad_up + place_R, (g_R * x_R * share_R).to(grad_up.dtype.element_ty), there_R)
