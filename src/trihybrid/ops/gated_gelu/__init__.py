"""The middle of a gated MLP with a GELU, as one kernel forwards and one backwards.

    h = gelu(gate) up        gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))      (arXiv 1606.08415)

In PyTorch these are two kernels and three, and the backward pass keeps gelu(gate) beside gate and up: a third of all
that an MLP with frozen matrices keeps.

Legend: any shape; all of one.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["gated_gelu", "gated_gelu_reference"]


def gated_gelu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition."""
    return functional.gelu(gate, approximate="tanh") * up


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """As `gated_gelu_reference`: the kernels on a GPU in half precision, rounded once; the definition elsewhere. Where
    nobody asks for gradients, both may be parts of wider rows."""
    if not fusable(gate, up):
        return gated_gelu_reference(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GatedGelu.apply(gate, up)
    from trihybrid.ops.gated_gelu.triton import forward

    return forward(gate, up)


def fusable(gate: Tensor, up: Tensor) -> bool:
    """Whether the kernels take these: a GPU, half precision, one shape."""
    alike = up.dtype == gate.dtype and up.shape == gate.shape
    return gate.is_cuda and gate.dtype in (torch.bfloat16, torch.float16) and alike


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        from trihybrid.ops.gated_gelu.triton import forward

        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        from trihybrid.ops.gated_gelu.triton import backward

        return backward(grad.contiguous(), *ctx.saved_tensors)
