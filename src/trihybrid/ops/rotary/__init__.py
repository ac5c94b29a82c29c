"""Rotary positions (arXiv 2104.09864) on the first channels of a head, alone or behind the head's norm.

    rotate:            (x_j, x_{j+F}) <- (c_j x_j + s_j x_{j+F}, c_j x_{j+F} - s_j x_j) for j < F     the rest stays
    normed_rotation:   y = rotate(g_h rms(x))                                       rms over the N channels of a head

A compiler reads and writes queries three times over for the second, and sums the gain's gradient in a kernel of its
own; on a GPU each direction is one pass over memory.

Legend: B batch, T time, H heads, N head width, F rotated pairs.
"""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

__all__ = ["frequencies", "fusable", "normed_rotation", "normed_rotation_reference", "rotary_table", "rotate"]


@torch.library.custom_op("trihybrid::rotary_table", mutates_args=())
def rotary_table(positions_BT: Tensor, frequencies_F: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, both [B, T, 1, F] in the frequencies' dtype.

    An operator of its own, because a compiler would otherwise work out every sine again in each head that is rotated,
    forwards and backwards: a tenth of a small model's step.
    """
    angle_BTF = positions_BT[:, :, None].to(frequencies_F.dtype) * frequencies_F
    return angle_BTF.cos()[:, :, None], angle_BTF.sin()[:, :, None]


@rotary_table.register_fake
def _(positions_BT: Tensor, frequencies_F: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*positions_BT.shape, 1, len(frequencies_F))
    return frequencies_F.new_empty(shape), frequencies_F.new_empty(shape)


def frequencies(
    dims: int, base: float, spacing: int, device: torch.device | None, dtype: torch.dtype
) -> Tensor:
    """base^(-2 j / spacing) for the pairs j = 0 .. dims / 2 - 1, [F]; `spacing` is `dims` in the usual definition."""
    pair_F = torch.arange(dims // 2, device=device, dtype=dtype)
    return base ** (-2 * pair_F / spacing)


def rotate(x_BTHN: Tensor, cosine_BT1F: Tensor, sine_BT1F: Tensor) -> Tensor:
    """Rotate the first 2 F channels, pair j being channels j and j + F (the half-split order); the rest stay."""
    pairs = cosine_BT1F.shape[-1]
    left, right, rest = x_BTHN.split([pairs, pairs, x_BTHN.shape[-1] - 2 * pairs], -1)
    return torch.cat(
        [left * cosine_BT1F + right * sine_BT1F, right * cosine_BT1F - left * sine_BT1F, rest], -1
    )


def normed_rotation_reference(
    x_BTHN: Tensor, gain_H: Tensor | None, cosine_BT1F: Tensor, sine_BT1F: Tensor, epsilon: float
) -> Tensor:
    """The definition; the gain is cast to x's dtype."""
    y_BTHN = rms_norm(x_BTHN, (x_BTHN.shape[-1],), eps=epsilon)
    if gain_H is not None:
        y_BTHN = y_BTHN * gain_H.to(x_BTHN.dtype)[:, None]
    return rotate(y_BTHN, cosine_BT1F, sine_BT1F)


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
