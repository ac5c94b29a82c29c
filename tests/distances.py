"""The distance of hidden states that distillation trains on, as its formula reads."""

import torch
from torch import Tensor


def distance(x_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """|x - target|^2 / |target|^2 of each row, averaged over the rows."""
    rows = zip(x_BTD, target_BTD, strict=True)
    return torch.stack([(x - target).pow(2).sum() / target.pow(2).sum() for x, target in rows]).mean()
