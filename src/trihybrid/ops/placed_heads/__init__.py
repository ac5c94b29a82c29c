"""Heads as attention reads them, behind their norm and their rotation (arXiv 2104.09864), for inference.

    z = w x / sqrt(mean x^2 + epsilon)        y_j = c_j z_j + s_j z_{(j + N/2) mod N}

In PyTorch these are four passes over memory; the kernel is one and rounds once, as it stores.

Legend: B batch, T time, H heads, N head width.
"""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

__all__ = ["fusable", "placed_heads", "placed_heads_reference"]

WIDEST = 512


def placed_heads_reference(
    x_BTHN: Tensor, weight_N: Tensor, epsilon: float, cosine_BT1N: Tensor, sine_BT1N: Tensor
) -> Tensor:
    """The definition."""
    z_BTHN = rms_norm(x_BTHN, (x_BTHN.shape[-1],), weight_N.to(x_BTHN.dtype), epsilon)
    return z_BTHN * cosine_BT1N + z_BTHN.roll(x_BTHN.shape[-1] // 2, -1) * sine_BT1N


def placed_heads(
    x_BTHN: Tensor, weight_N: Tensor, epsilon: float, cosine_BT1N: Tensor, sine_BT1N: Tensor
) -> Tensor:
    """[B, T, H, N] in x's dtype: by the kernel where x is `fusable`, which wants no gradient. Shapes that do not go
    together are torch's RuntimeError.

    Args:
        x_BTHN: queries or keys; heads lie one behind the other.
        weight_N: of the norm, any floating dtype.
        epsilon: added to the mean square.
        cosine_BT1N, sine_BT1N: of all channels; sines with the sign of the formula above.
    """
    if not fusable(x_BTHN):
        return placed_heads_reference(x_BTHN, weight_N, epsilon, cosine_BT1N, sine_BT1N)
    from trihybrid.ops.placed_heads.triton import forward

    batch, length, _, width = x_BTHN.shape
    table = (part.expand(batch, length, 1, width).contiguous() for part in (cosine_BT1N, sine_BT1N))
    return forward(x_BTHN, weight_N.expand(width).contiguous(), epsilon, *table)


def fusable(x_BTHN: Tensor) -> bool:
    """Whether the kernel takes these heads: a GPU, half precision, N a power of two from 16 to 512, one behind the
    other, and nobody who asks for their gradient."""
    width = x_BTHN.shape[-1]
    fits = 16 <= width <= WIDEST and width & (width - 1) == 0 and x_BTHN.stride()[2:] == (width, 1)
    wanted = torch.is_grad_enabled() and x_BTHN.requires_grad
    return fits and not wanted and x_BTHN.is_cuda and x_BTHN.dtype in (torch.bfloat16, torch.float16)
