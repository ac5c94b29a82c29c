"""Rotary positions (arXiv 2104.09864) on the first channels of a head, alone or behind the head's norm.

    rotate:            (x_j, x_{j+F}) <- (c_j x_j + s_j x_{j+F}, c_j x_{j+F} - s_j x_j) for j < F     the rest stays
    normed_rotation:   y = rotate(g_h rms(x))                                       rms over the N channels of a head

A compiler reads and writes queries three times over for the second, and sums the gain's gradient in a kernel of its
own; on a GPU each direction is one pass over memory.

Legend: B batch, T time, H heads, N head width, F rotated pairs.
"""

import torch
from torch import Tensor

from trihybrid.ops.rotary.definition import (
    frequencies,
    normed_rotation_reference,
    rotary_table,
    rotate,
)

__all__ = ["frequencies", "fusable", "normed_rotation", "normed_rotation_reference", "rotary_table", "rotate"]


def normed_rotation(
    x_BTHN: Tensor, gain_H: Tensor | None, cosine_BT1F: Tensor, sine_BT1F: Tensor, epsilon: float
) -> Tensor:
    """Heads divided by their rms, times a gain each, rotated: [B, T, H, N] in x's dtype; see `fusable` for the kernels.

    Args:
        x_BTHN: queries or keys.
        gain_H: [H], any floating dtype; None for a gain of one.
        cosine_BT1F, sine_BT1F: [B, T, 1, F] in x's dtype, 2 F <= N; F = 0 rotates nothing. The kernels give them no
            gradient.
        epsilon: added to the mean square.
    """
    if not fusable(x_BTHN, cosine_BT1F.shape[-1]):
        return normed_rotation_reference(x_BTHN, gain_H, cosine_BT1F, sine_BT1F, epsilon)
    wide_H = None if gain_H is None else gain_H.float()
    return _fused(x_BTHN, wide_H, cosine_BT1F, sine_BT1F, epsilon)


def fusable(x_BTHN: Tensor, pairs: int) -> bool:
    """Whether the kernels take these heads: a GPU, bfloat16, N a power of two in 16 to 256 that holds the pairs."""
    width = x_BTHN.shape[-1]
    fits = 16 <= width <= 256 and width & (width - 1) == 0 and 2 * pairs <= width
    return fits and x_BTHN.is_cuda and x_BTHN.dtype == torch.bfloat16


@torch.library.custom_op("trihybrid::normed_rotation", mutates_args=(), device_types="cuda")
def _fused(
    x_BTHN: Tensor, gain_H: Tensor | None, cosine_BT1F: Tensor, sine_BT1F: Tensor, epsilon: float
) -> Tensor:
    from trihybrid.ops.rotary.triton import forward

    return forward(x_BTHN.contiguous(), gain_H, cosine_BT1F.contiguous(), sine_BT1F.contiguous(), epsilon)


@_fused.register_fake
def _(
    x_BTHN: Tensor, gain_H: Tensor | None, cosine_BT1F: Tensor, sine_BT1F: Tensor, epsilon: float
) -> Tensor:
    return x_BTHN.new_empty(x_BTHN.shape)


@torch.library.custom_op("trihybrid::normed_rotation_backward", mutates_args=(), device_types="cuda")
def _fused_backward(
    grad_BTHN: Tensor,
    x_BTHN: Tensor,
    gain_H: Tensor | None,
    cosine_BT1F: Tensor,
    sine_BT1F: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    from trihybrid.ops.rotary.triton import backward

    return backward(
        grad_BTHN.contiguous(),
        x_BTHN.contiguous(),
        gain_H,
        cosine_BT1F.contiguous(),
        sine_BT1F.contiguous(),
        epsilon,
    )


@_fused_backward.register_fake
def _(
    grad_BTHN: Tensor,
    x_BTHN: Tensor,
    gain_H: Tensor | None,
    cosine_BT1F: Tensor,
    sine_BT1F: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    heads = 0 if gain_H is None else len(gain_H)
    return x_BTHN.new_empty(x_BTHN.shape), x_BTHN.new_empty(heads, dtype=torch.float32)


def _keep(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, float],
    output: Tensor,
) -> None:
    ctx.save_for_backward(*inputs[:4])  # type: ignore[arg-type]
    ctx.epsilon = inputs[4]  # type: ignore[attr-defined]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, grad_BTHN: Tensor
) -> tuple[Tensor, Tensor | None, None, None, None]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    dx_BTHN, dgain_H = _fused_backward(grad_BTHN, *saved, ctx.epsilon)  # type: ignore[attr-defined]
    return dx_BTHN, None if saved[1] is None else dgain_H, None, None, None


_fused.register_autograd(_differentiate, setup_context=_keep)
