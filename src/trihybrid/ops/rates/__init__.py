"""Decay and in-context learning rate of RWKV-7 from what the low-rank products gave (arXiv 2503.14456).

    log W = -exp(-1/2) sigmoid(w0 + decay)        a = sigmoid(a0 + iclr)

From the pre-activations on both are float32: in half precision a W near one would lose its distance from one. In
PyTorch that is seven passes over float32; the kernel reads half precision and writes the two results.

Legend: B batch, T time, C channels.
"""

import torch
from torch import Tensor

from trihybrid.ops.rates.definition import DECAY_FLOOR, rates_reference

__all__ = ["DECAY_FLOOR", "fusable", "rates", "rates_reference"]


def rates(decay_BTC: Tensor, iclr_BTC: Tensor, w0_C: Tensor, a0_C: Tensor) -> tuple[Tensor, Tensor]:
    """log W and a, [B, T, C]: by the kernel on a GPU in half precision where nobody asks for gradients.

    Args:
        decay_BTC, iclr_BTC: what is added to the offsets.
        w0_C, a0_C: the offsets, float32 or half precision.

    Shapes that do not go together are torch's RuntimeError.
    """
    if not fusable(decay_BTC, iclr_BTC, w0_C, a0_C):
        return rates_reference(decay_BTC, iclr_BTC, w0_C, a0_C)
    from trihybrid.ops.rates.triton import forward

    return forward(*(x.contiguous() for x in (decay_BTC, iclr_BTC, w0_C, a0_C)))


def fusable(decay_BTC: Tensor, iclr_BTC: Tensor, w0_C: Tensor, a0_C: Tensor) -> bool:
    """Whether the kernel takes these: a GPU, half precision, shapes that fit, no gradients wanted."""
    half = all(x.dtype in (torch.bfloat16, torch.float16) for x in (decay_BTC, iclr_BTC))
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (decay_BTC, iclr_BTC, w0_C, a0_C))
    fit = decay_BTC.shape == iclr_BTC.shape and w0_C.shape == a0_C.shape == decay_BTC.shape[-1:]
    return decay_BTC.is_cuda and half and fit and not wanted
