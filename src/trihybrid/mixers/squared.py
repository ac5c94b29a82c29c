"""The two projections around a squared (leaky) ReLU: the MLP of compact models, and the token shift's key and value."""

import torch
from torch import Tensor, nn

from trihybrid.mixers.contract import Projection
from trihybrid.ops.squared_mlp import fusable, squared_mlp


def squared(x: Tensor, up: Projection, down: Projection, slope: float) -> Tensor:
    """down(max(h, slope h)^2) with h = up(x); the token shift's slope is 0. Neither projection has a bias.

    Training takes both matrices at once; without a gradient each stands alone, where hooks can see its inputs.
    """
    if torch.is_grad_enabled() and fusable(x, up.weight.shape):
        return squared_mlp(x, up.matrix(x.dtype), down.matrix(x.dtype), slope)
    return down(nn.functional.leaky_relu(up(x), slope).square())
