"""The two matrices of an MLP around a squared (leaky) ReLU, with the activation inside the matrix products.

    h = x U^T     a = act(h)^2 with act(h) = max(h, slope h)     y = a W^T

A compiler gives the activation kernels of their own, which read and write the widest tensors of the model: 3 + 3 model
widths forwards and 9 backwards. On a GPU the first product writes a and the signs of h, a bit each; the product behind
the gradient of h multiplies by the derivative as it writes.

Legend: N tokens, D model width, I inner width, W = I / 32 words of signs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

__all__ = ["squared_mlp", "squared_mlp_reference"]


def squared_mlp_reference(x: Tensor, up_ID: Tensor, down_DI: Tensor, slope: float) -> Tensor:
    """The definition, for any leading dimensions; all of one dtype."""
    return leaky_relu(x @ up_ID.mT, slope).square() @ down_DI.mT


def squared_mlp(x: Tensor, up_ID: Tensor, down_DI: Tensor, slope: float) -> Tensor:
    """As `squared_mlp_reference`. Fused on a Hopper GPU in bfloat16 for widths in multiples of 128 (inner) and 64.

    Args:
        x: [..., D]; up_ID: [I, D]; down_DI: [D, I], of x's dtype.
        slope: factor on negative h, in [0, 1).
    """
    if not fusable(x, up_ID.shape):
        return squared_mlp_reference(x, up_ID, down_DI, slope)
    y_ND, _, _ = _fused(x.flatten(0, -2), up_ID, down_DI, slope)
    return y_ND.unflatten(0, x.shape[:-1])


def fusable(x: Tensor, shape: Sequence[int]) -> bool:
    """Whether the fused product takes these tokens [..., D] and matrices of shape [I, D] and [D, I]."""
    inner, width = shape
    fits = inner % 128 == 0 and width % 64 == 0 and x[..., 0].numel() % 128 == 0
    return (
        fits
        and x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


@torch.library.custom_op("trihybrid::squared_mlp", mutates_args=(), device_types="cuda")
def _fused(x_ND: Tensor, up_ID: Tensor, down_DI: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    from trihybrid.ops.squared_mlp.triton import activate

    active_NI, signs_WN = activate(x_ND.contiguous(), up_ID.contiguous(), slope)
    return active_NI @ down_DI.mT, active_NI, signs_WN


@_fused.register_fake
def _(x_ND: Tensor, up_ID: Tensor, down_DI: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    tokens, inner = x_ND.shape[0], up_ID.shape[0]
    signs_WN = x_ND.new_empty(inner // 32 if slope else 0, tokens, dtype=torch.int32)
    return x_ND.new_empty(tokens, down_DI.shape[0]), x_ND.new_empty(tokens, inner), signs_WN


@torch.library.custom_op("trihybrid::squared_mlp_backward", mutates_args=(), device_types="cuda")
def _fused_backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    up_ID: Tensor,
    down_DI: Tensor,
    active_NI: Tensor,
    signs_WN: Tensor,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from trihybrid.ops.squared_mlp.triton import activate_backward

    grad_ND = grad_ND.contiguous()
    grad_NI = activate_backward(grad_ND, down_DI.contiguous(), active_NI, signs_WN, slope)
    return grad_NI @ up_ID, grad_NI.mT @ x_ND, grad_ND.mT @ active_NI


@_fused_backward.register_fake
def _(
    grad_ND: Tensor,
    x_ND: Tensor,
    up_ID: Tensor,
    down_DI: Tensor,
    active_NI: Tensor,
    signs_WN: Tensor,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), up_ID.new_empty(up_ID.shape), down_DI.new_empty(down_DI.shape)


def _keep(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, float],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    x_ND, up_ID, down_DI, slope = inputs
    _, active_NI, signs_WN = output
    ctx.mark_non_differentiable(active_NI, signs_WN)
    ctx.save_for_backward(x_ND, up_ID, down_DI, active_NI, signs_WN)
    ctx.slope = slope  # type: ignore[attr-defined]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, grad_ND: Tensor, _active: None, _signs: None
) -> tuple[Tensor, Tensor, Tensor, None]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    return *_fused_backward(grad_ND, *saved, ctx.slope), None  # type: ignore[attr-defined]


_fused.register_autograd(_differentiate, setup_context=_keep)
