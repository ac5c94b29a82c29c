"""Exclusive self-attention (XSA): what attention read, less its part along the token's own value.

    o_h <- o_h - (o_h . u) u     u = v / max(|v|, 1e-12), v the token's value in the key/value head that h reads

Source: PR 1007 of openai/parameter-golf. On a GPU each direction is one pass over memory.

Legend: B batch, T time, H query heads, G value heads, Q = H / G query heads a value head, N head width.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["exclude_own_value", "exclude_own_value_reference", "fusable"]


def exclude_own_value_reference(o_BTHN: Tensor, v_BTGN: Tensor) -> Tensor:
    """The definition: o - (o . u) u with u the direction of the token's own value, [B, T, H, N]."""
    own_BTG1N = normalize(v_BTGN, dim=-1)[:, :, :, None]
    o_BTGQN = o_BTHN.unflatten(2, (v_BTGN.shape[2], -1))
    along = (o_BTGQN * own_BTG1N).sum(-1, keepdim=True)
    return (o_BTGQN - along * own_BTG1N).flatten(2, 3)


def exclude_own_value(o_BTHN: Tensor, v_BTGN: Tensor) -> Tensor:
    """As `exclude_own_value_reference`; see `fusable` for the kernels.

    Args:
        o_BTHN: what each query head read, [B, T, H, N].
        v_BTGN: the token's own values [B, T, G, N], of o's dtype; head h reads h // (H / G).
    """
    if not fusable(o_BTHN):
        return exclude_own_value_reference(o_BTHN, v_BTGN)
    return _fused(o_BTHN, v_BTGN)


def fusable(o_BTHN: Tensor) -> bool:
    """Whether the kernels take these heads: a GPU, bfloat16, N a power of two in 16 to 256."""
    width = o_BTHN.shape[-1]
    fits = 16 <= width <= 256 and width & (width - 1) == 0
    return fits and o_BTHN.is_cuda and o_BTHN.dtype == torch.bfloat16


@torch.library.custom_op("trihybrid::exclude_own_value", mutates_args=(), device_types="cuda")
def _fused(o_BTHN: Tensor, v_BTGN: Tensor) -> Tensor:
    from trihybrid.ops.exclude_value.triton import forward

    return forward(o_BTHN.contiguous(), v_BTGN.contiguous())


@_fused.register_fake
def _(o_BTHN: Tensor, v_BTGN: Tensor) -> Tensor:
    return o_BTHN.new_empty(o_BTHN.shape)


@torch.library.custom_op("trihybrid::exclude_own_value_backward", mutates_args=(), device_types="cuda")
def _fused_backward(grad_BTHN: Tensor, o_BTHN: Tensor, v_BTGN: Tensor) -> tuple[Tensor, Tensor]:
    from trihybrid.ops.exclude_value.triton import backward

    return backward(grad_BTHN.contiguous(), o_BTHN.contiguous(), v_BTGN.contiguous())


@_fused_backward.register_fake
def _(grad_BTHN: Tensor, o_BTHN: Tensor, v_BTGN: Tensor) -> tuple[Tensor, Tensor]:
    return o_BTHN.new_empty(o_BTHN.shape), v_BTGN.new_empty(v_BTGN.shape)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad_BTHN: Tensor) -> tuple[Tensor, Tensor]:
    return _fused_backward(grad_BTHN, *ctx.saved_tensors)  # type: ignore[attr-defined]


_fused.register_autograd(_differentiate, setup_context=_keep)
