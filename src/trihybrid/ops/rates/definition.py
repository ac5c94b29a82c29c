"""The definition of `ops.rates`, for models that leave their kernels behind.

Legend: B batch, T time, C channels.
"""

import math

import torch
from torch import Tensor

DECAY_FLOOR = -math.exp(-0.5)
"""log W approaches this from above: about -0.6065."""


def rates_reference(decay_BTC: Tensor, iclr_BTC: Tensor, w0_C: Tensor, a0_C: Tensor) -> tuple[Tensor, Tensor]:
    """log W and a, [B, T, C], of what is added to the offsets: float32, or float64 where the products are."""
    wide = torch.float64 if decay_BTC.dtype == torch.float64 else torch.float32
    log_w_BTC = DECAY_FLOOR * torch.sigmoid(w0_C + decay_BTC.to(wide))
    return log_w_BTC, torch.sigmoid(a0_C + iclr_BTC.to(wide))
