"""Where the parameters of the RWKV-7 mixer start: the training code of the hxa07 family.

Legend: C channels, N head width.
"""

import math

import torch
from torch import Tensor, nn

from trihybrid.mixers.contract import Write

BONUS = -0.04
"""r_k everywhere, as hxa079 starts."""


def decay_start(channels: int, head_dim: int, depth: float) -> Tensor:
    """w0 [C] = -6 + 6 (n / (C-1))^(1 + p^0.3) + 0.5 + 2.5 zz for channel n and depth p, 0 in the first layer and 1 in
    the last; zz = z|z| for z from -1 to 1 inside a head."""
    ratio_C, zz_C = _places(channels, head_dim)
    return -5.5 + 6 * ratio_C ** (1 + depth**0.3) + 2.5 * zz_C


def iclr_start(channels: int, head_dim: int) -> Tensor:
    """a0 [C] = -0.19 + 0.3 zz + 0.4 (n / (C-1) - 0.5), zz as in `decay_start`."""
    ratio_C, zz_C = _places(channels, head_dim)
    return -0.19 + 0.3 * zz_C + 0.4 * (ratio_C - 0.5)


def residual_start(channels: int) -> Tensor:
    """v0 and k0 [channels] = 0.73 - 0.4 (n / (channels - 1) - 0.5)."""
    return 0.73 - 0.4 * (torch.arange(channels) / max(channels - 1, 1) - 0.5)


def _places(channels: int, head_dim: int) -> tuple[Tensor, Tensor]:
    n_C = torch.arange(channels)
    half = max((head_dim - 1) / 2, 0.5)
    z_C = ((n_C % head_dim) - (head_dim - 1) / 2) / half
    return n_C / max(channels - 1, 1), z_C * z_C.abs()


def scaled_orthogonal(shape: torch.Size, gain: float = 0.1) -> Tensor:
    """Orthogonal matrix times `gain`, and times sqrt(rows / columns) when it has more rows than columns."""
    rows, columns = shape
    return nn.init.orthogonal_(torch.empty(rows, columns), gain=gain * math.sqrt(max(rows / columns, 1.0)))


def write_gate(g1: Tensor, g2: Tensor, start: str, write: Write) -> None:
    """Initial gate sigmoid(x g1) g2.

    `published`: g1 = 0, g2 small orthogonal, a gate near zero. `unit`: g1 = 0 and rows of g2 around 2 / rank, so that
    the gate is one for every input. Equal rows would get equal gradients for ever and leave a gate of rank one, so the
    rows differ by noise that adds up to zero over the rank.
    """
    write(g1, torch.zeros(g1.shape))
    if start == "published":
        write(g2, scaled_orthogonal(g2.shape))
        return
    rank = g2.shape[0]
    noise = scaled_orthogonal(g2.shape)
    write(g2, 2 / rank + noise - noise.mean(0, keepdim=True))
