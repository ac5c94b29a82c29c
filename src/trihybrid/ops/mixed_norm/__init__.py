"""The residual stream between two branches of a compact model: sum, mix with the first rows, norm and token shift in
one pass over memory.

    s = x + branch or x + sigmoid(gate) branch        u = m0 s + m1 first        z = scale u / sqrt(mean u^2 + epsilon)
    r = z^- + a (z - z^-)        k = z^- + b (z - z^-)        z^-_t = z_{t-1}, zero where a document begins

with m0, m1, a and b a channel each. A compiler needs a pass for every column sum of the backward, and writes z, z^- and
the gated branch out. On a GPU the kernels compute in float32 and round once, as they store.

Legend: B batch, T time, D model width.
"""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from trihybrid.ops.token_shift import token_shift

__all__ = [
    "fusable",
    "mixed_blend",
    "mixed_blend_reference",
    "mixed_norm",
    "mixed_norm_reference",
    "scaled_norm",
]


def scaled_norm(u: Tensor, scale: float, epsilon: float) -> Tensor:
    """scale u / sqrt(mean u^2 + epsilon) over the last dimension, [..., D] in u's dtype."""
    z = rms_norm(u, (u.shape[-1],), eps=epsilon)
    return z if scale == 1.0 else z * scale


def mixed_norm_reference(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    first_BTD: Tensor | None,
    mix_2D: Tensor | None,
    scale: float,
    epsilon: float,
    gate_BTD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `mixed_norm`."""
    if branch_BTD is not None and gate_BTD is not None:
        branch_BTD = torch.sigmoid(gate_BTD) * branch_BTD
    u_BTD = x_BTD if branch_BTD is None else x_BTD + branch_BTD
    if mix_2D is not None:
        own_D, first_D = mix_2D.to(x_BTD.dtype)
        u_BTD = own_D * u_BTD + first_D * first_BTD
    return u_BTD, scaled_norm(u_BTD, scale, epsilon)


def mixed_blend_reference(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    first_BTD: Tensor | None,
    mix_2D: Tensor | None,
    positions_BT: Tensor,
    share_r_D: Tensor,
    share_k_D: Tensor,
    scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `mixed_blend`."""
    u_BTD, z_BTD = mixed_norm_reference(x_BTD, branch_BTD, first_BTD, mix_2D, scale, epsilon)
    before_BTD = token_shift(z_BTD, None, positions_BT)
    r_BTD, k_BTD = (
        torch.lerp(before_BTD, z_BTD, share_D.to(z_BTD.dtype)) for share_D in (share_r_D, share_k_D)
    )
    return u_BTD, r_BTD, k_BTD


def mixed_norm(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    first_BTD: Tensor | None,
    mix_2D: Tensor | None,
    scale: float,
    epsilon: float,
    gate_BTD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mixed stream u and its norm z, both [B, T, D] in x's dtype; by kernels where x is `fusable`.

    Args:
        x_BTD: the stream.
        branch_BTD: what is added to it, of x's dtype; None for nothing.
        first_BTD: what it is mixed with, of x's dtype; unread when `mix_2D` is None.
        mix_2D: m0 and m1, of any dtype; None for u = s.
        scale, epsilon: see above.
        gate_BTD: the gate before its logistic function, of x's dtype, where there is a branch and no mix; None for a
            branch as it is.
    """
    assert gate_BTD is None or (branch_BTD is not None and mix_2D is None)
    if not fusable(x_BTD):
        return mixed_norm_reference(x_BTD, branch_BTD, first_BTD, mix_2D, scale, epsilon, gate_BTD)
    first_BTD, mix_2D = _mixed(first_BTD, mix_2D)
    u_BTD, z_BTD, _, _ = _forward(x_BTD, branch_BTD, gate_BTD, first_BTD, mix_2D, None, None, scale, epsilon)
    return u_BTD, z_BTD


def mixed_blend(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    first_BTD: Tensor | None,
    mix_2D: Tensor | None,
    positions_BT: Tensor,
    share_r_D: Tensor,
    share_k_D: Tensor,
    scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixed stream u and the two blends r and k of its norm, as `mixed_norm` otherwise. Nothing is before the first
    token of a row of the block, whatever its position.

    Args:
        positions_BT: int64, 0 at the first token of a document.
        share_r_D, share_k_D: a and b, of any dtype.
    """
    if not fusable(x_BTD):
        return mixed_blend_reference(
            x_BTD, branch_BTD, first_BTD, mix_2D, positions_BT, share_r_D, share_k_D, scale, epsilon
        )
    first_BTD, mix_2D = _mixed(first_BTD, mix_2D)
    shares_2D = torch.stack([share_r_D.float(), share_k_D.float()])
    u_BTD, r_BTD, k_BTD, _ = _forward(
        x_BTD, branch_BTD, None, first_BTD, mix_2D, positions_BT, shares_2D, scale, epsilon
    )
    return u_BTD, r_BTD, k_BTD


def fusable(x_BTD: Tensor) -> bool:
    """Whether the kernels take this stream: a GPU, bfloat16, D a power of two from 64 to 2048."""
    width = x_BTD.shape[-1]
    return (
        x_BTD.is_cuda and x_BTD.dtype == torch.bfloat16 and 64 <= width <= 2048 and width & (width - 1) == 0
    )


def _mixed(first_BTD: Tensor | None, mix_2D: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if mix_2D is None else (first_BTD, mix_2D.float())


def _rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("trihybrid::mixed_norm", mutates_args=(), device_types="cuda")
def _forward(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_BTD: Tensor | None,
    first_BTD: Tensor | None,
    mix_2D: Tensor | None,
    positions_BT: Tensor | None,
    shares_2D: Tensor | None,
    scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, z and an empty tensor, or u, r and k where positions and shares are given; and the factor of each norm."""
    from trihybrid.ops.mixed_norm.triton import forward

    return forward(
        x_BTD.contiguous(),
        _rows(branch_BTD),
        _rows(gate_BTD),
        _rows(first_BTD),
        _rows(mix_2D),
        positions_BT,
        _rows(shares_2D),
        scale,
        epsilon,
    )


@_forward.register_fake
def _(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_BTD: Tensor | None,
    first_BTD: Tensor | None,
    mix_2D: Tensor | None,
    positions_BT: Tensor | None,
    shares_2D: Tensor | None,
    scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = x_BTD.shape
    k_BTD = x_BTD.new_empty((0,) if positions_BT is None else shape)
    factor_BT = x_BTD.new_empty(shape[:2], dtype=torch.float32)
    return x_BTD.new_empty(shape), x_BTD.new_empty(shape), k_BTD, factor_BT


@torch.library.custom_op("trihybrid::mixed_norm_backward", mutates_args=(), device_types="cuda")
def _backward(
    grad_u_BTD: Tensor,
    grad_r_BTD: Tensor,
    grad_k_BTD: Tensor | None,
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_BTD: Tensor | None,
    first_BTD: Tensor | None,
    mix_2D: Tensor | None,
    positions_BT: Tensor | None,
    shares_2D: Tensor | None,
    factor_BT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of s, branch and gate, first, mix and shares; empty where the input is None, as is that of a branch
    without a gate, which is that of s. `grad_r` is z's without positions."""
    from trihybrid.ops.mixed_norm.triton import backward

    return backward(
        grad_u_BTD.contiguous(),
        grad_r_BTD.contiguous(),
        _rows(grad_k_BTD),
        x_BTD.contiguous(),
        _rows(branch_BTD),
        _rows(gate_BTD),
        _rows(first_BTD),
        _rows(mix_2D),
        positions_BT,
        _rows(shares_2D),
        factor_BT,
        scale,
    )


@_backward.register_fake
def _(
    grad_u_BTD: Tensor,
    grad_r_BTD: Tensor,
    grad_k_BTD: Tensor | None,
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_BTD: Tensor | None,
    first_BTD: Tensor | None,
    mix_2D: Tensor | None,
    positions_BT: Tensor | None,
    shares_2D: Tensor | None,
    factor_BT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, width = x_BTD.shape, x_BTD.shape[2]
    gated = (0,) if gate_BTD is None else shape
    return (
        x_BTD.new_empty(shape),
        x_BTD.new_empty(gated),
        x_BTD.new_empty(gated),
        x_BTD.new_empty((0,) if mix_2D is None else shape),
        factor_BT.new_empty((0,) if mix_2D is None else (2, width)),
        factor_BT.new_empty((0,) if shares_2D is None else (2, width)),
    )


def _keep(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[
        Tensor,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        float,
        float,
    ],
    output: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    x_BTD, branch_BTD, gate_BTD, first_BTD, mix_2D, positions_BT, shares_2D, scale, _ = inputs
    u_BTD, _, k_BTD, factor_BT = output
    ctx.branched = branch_BTD is not None  # type: ignore[attr-defined]
    if mix_2D is None:
        # u is all that the norm's backward asks for: one tensor less to keep and to read, but for a gate's.
        x_BTD, branch_BTD = u_BTD, None if gate_BTD is None else branch_BTD
    ctx.mark_non_differentiable(*((factor_BT,) if k_BTD.dim() == 3 else (k_BTD, factor_BT)))
    kept = (x_BTD, branch_BTD, gate_BTD, first_BTD, mix_2D, positions_BT, shares_2D, factor_BT)
    ctx.save_for_backward(*kept)  # type: ignore[arg-type]
    ctx.scale = scale  # type: ignore[attr-defined]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx,
    grad_u_BTD: Tensor | None,
    grad_r_BTD: Tensor | None,
    grad_k_BTD: Tensor | None,
    _factor: None,
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    x_BTD, _, gate_BTD, _, mix_2D, positions_BT, shares_2D, _ = saved
    if grad_u_BTD is None:
        grad_u_BTD = torch.zeros_like(x_BTD)
    if grad_r_BTD is None:
        grad_r_BTD = torch.zeros_like(x_BTD)
    if positions_BT is None:
        grad_k_BTD = None
    elif grad_k_BTD is None:
        grad_k_BTD = torch.zeros_like(x_BTD)
    grad_s_BTD, grad_branch_BTD, grad_gate_BTD, grad_first_BTD, grad_mix_2D, grad_shares_2D = _backward(
        grad_u_BTD,
        grad_r_BTD,
        grad_k_BTD,
        *saved,
        ctx.scale,  # type: ignore[attr-defined]
    )
    if gate_BTD is None:
        grad_branch_BTD = grad_s_BTD
    return (
        grad_s_BTD,
        grad_branch_BTD if ctx.branched else None,  # type: ignore[attr-defined]
        None if gate_BTD is None else grad_gate_BTD,
        None if mix_2D is None else grad_first_BTD,
        None if mix_2D is None else grad_mix_2D,
        None,
        None if shares_2D is None else grad_shares_2D,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_keep)
