"""Weights at which every part of a model shows in its logits."""

import torch
from torch import nn


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Nothing zero (TICA's output projection starts there), no norm or layer scalar at one, no bias at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("w0", "a0", "g2", "bias")):
            tensor.add_(0.1 * noise)
        elif "norm" in name or name.endswith("layer_scalar"):
            tensor.copy_(1 + 0.1 * noise)
        elif tensor.dim() == 2:
            # An embedding is multiplied by the root of its width.
            tensor.copy_(noise * (0.5 if "embed" in name else tensor.shape[-1] ** -0.5))
