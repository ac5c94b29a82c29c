"""Frozen parts of teacher and student in fewer kernels: norms as the family says, and the middle of Gemma's MLPs.

Only classes change, so that parameters, names and hooks stay; off the GPU every part computes what it did, to the bit.
"""

from torch import Tensor, nn
from transformers.activations import GELUTanh
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextMLP

from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.ops.gated_gelu import fusable, gated_gelu


class _Fused(nn.Module):
    """down(gelu(gate x) * (up x)), with the middle as one kernel."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not fusable(x, x):
            return super().forward(x)
        return self.down_proj(gated_gelu(self.gate_proj(x), self.up_proj(x)))


class FusedGemma3MLP(_Fused, Gemma3MLP):
    """Gemma 3's."""


class FusedGemma4MLP(_Fused, Gemma4TextMLP):
    """Gemma 4's."""


FUSED: dict[type[nn.Module], type[nn.Module]] = {Gemma3MLP: FusedGemma3MLP, Gemma4TextMLP: FusedGemma4MLP}


def fuse(student: HybridForCausalLM, model: nn.Module) -> None:
    """Let the parts of `model`, the student itself or its teacher, take fewer kernels, in place."""
    student.model.fuse(model)
    for module in model.modules():
        if type(module) in FUSED and isinstance(module.act_fn, GELUTanh):
            module.__class__ = FUSED[type(module)]
