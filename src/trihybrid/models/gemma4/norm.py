"""Gemma-4's RMS norm as one kernel where torch has one.

    y = x (mean(x^2) + epsilon)^-1/2 w        computed in float32, rounded once

transformers writes it as eight operations on tensors, whose float32 intermediates a backward pass keeps.
"""

from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm


class FusedRMSNorm(Gemma4RMSNorm):
    """The same norm. Off the GPU, and where weight and input differ in dtype (a master weight), it is transformers'."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight if self.with_scale else None
        if not hidden_states.is_cuda or (weight is not None and weight.dtype != hidden_states.dtype):
            return super().forward(hidden_states)
        return fused_norm(hidden_states, weight, self.eps)


def fused_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """The formula by torch's operator, over the last axis."""
    return functional.rms_norm(x, x.shape[-1:], weight, epsilon)


def fuse_norms(module: nn.Module) -> None:
    """Let every norm in `module` be a `FusedRMSNorm`, in place: parameters, names and hooks stay."""
    for norm in module.modules():
        if type(norm) is Gemma4RMSNorm:
            norm.__class__ = FusedRMSNorm
