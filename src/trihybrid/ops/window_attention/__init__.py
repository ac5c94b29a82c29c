"""Sliding-window attention of a block of tokens over itself, in O(T window), forwards and backwards.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s    over the s <= t of t's document with t - s < window

`benchmarks/compact_kernels.py` times it beside FlexAttention.

Legend: B batch, T time, H query heads, G key/value heads, D head width.
"""

import torch
from torch import Tensor

__all__ = ["fits", "window_attention"]

TILE = 64


def fits(q_BTHD: Tensor, k_BTGD: Tensor) -> bool:
    """Whether the kernels take these: a GPU, half precision, T in multiples of `TILE`, D 16, 32, 64 or 128."""
    half = q_BTHD.dtype in (torch.bfloat16, torch.float16)
    sizes = q_BTHD.shape[1] % TILE == 0 and q_BTHD.shape[3] in (16, 32, 64, 128)
    return q_BTHD.is_cuda and half and sizes and q_BTHD.shape[2] % k_BTGD.shape[2] == 0


def window_attention(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, positions_BT: Tensor, window: int, scale: float
) -> Tensor:
    """[B, T, H, D] in the queries' dtype, by kernels; see `fits` for what they take.

    Args:
        q_BTHD, k_BTGD, v_BTGD: queries [B, T, H, D], keys and values [B, T, G, D]; head h reads h // (H / G).
        positions_BT: int64, 0 at the first token of a document; a query reads no more than its position back.
        window: how many tokens a query reads, itself included, at least 1.
        scale: factor on the scores.
    """
    o_BTHD, _ = _forward(q_BTHD, k_BTGD, v_BTGD, positions_BT, window, scale)
    return o_BTHD


@torch.library.custom_op("trihybrid::window_attention", mutates_args=(), device_types="cuda")
def _forward(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, positions_BT: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    from trihybrid.ops.window_attention.triton import forward

    return forward(
        q_BTHD.contiguous(),
        k_BTGD.contiguous(),
        v_BTGD.contiguous(),
        positions_BT.contiguous(),
        window,
        scale,
    )


@_forward.register_fake
def _(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, positions_BT: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q_BTHD.shape
    return q_BTHD.new_empty(q_BTHD.shape), q_BTHD.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("trihybrid::window_attention_backward", mutates_args=(), device_types="cuda")
def _backward(
    grad_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    positions_BT: Tensor,
    o_BTHD: Tensor,
    norm_BHT: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from trihybrid.ops.window_attention.triton import backward

    return backward(
        grad_BTHD.contiguous(),
        q_BTHD.contiguous(),
        k_BTGD.contiguous(),
        v_BTGD.contiguous(),
        positions_BT.contiguous(),
        o_BTHD,
        norm_BHT,
        window,
        scale,
    )


@_backward.register_fake
def _(
    grad_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    positions_BT: Tensor,
    o_BTHD: Tensor,
    norm_BHT: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_BTHD.new_empty(q_BTHD.shape), k_BTGD.new_empty(k_BTGD.shape), v_BTGD.new_empty(v_BTGD.shape)


def _keep(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, int, float],
    output: tuple[Tensor, Tensor],
) -> None:
    q_BTHD, k_BTGD, v_BTGD, positions_BT, window, scale = inputs
    o_BTHD, norm_BHT = output
    ctx.mark_non_differentiable(norm_BHT)
    ctx.save_for_backward(q_BTHD, k_BTGD, v_BTGD, positions_BT, o_BTHD, norm_BHT)
    ctx.window, ctx.scale = window, scale  # type: ignore[attr-defined]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, grad_BTHD: Tensor, _norm: None
) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    gradients = _backward(grad_BTHD, *saved, ctx.window, ctx.scale)  # type: ignore[attr-defined]
    return *gradients, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
