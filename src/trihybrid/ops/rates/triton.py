"""The kernel of `rates`.

Legend: R elements of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.rates import DECAY_FLOOR

TILE = 1024
FLOOR = tl.constexpr(DECAY_FLOOR)


def forward(decay_BTC: Tensor, iclr_BTC: Tensor, w0_C: Tensor, a0_C: Tensor) -> tuple[Tensor, Tensor]:
    """log W and a, float32. All contiguous."""
    log_w_BTC, a_BTC = (torch.empty_like(decay_BTC, dtype=torch.float32) for _ in range(2))
    count = decay_BTC.numel()
    _rated[(triton.cdiv(count, TILE),)](
        decay_BTC, iclr_BTC, w0_C, a0_C, log_w_BTC, a_BTC, count, decay_BTC.shape[-1], TILE=TILE, num_warps=4
    )
    return log_w_BTC, a_BTC


@triton.jit
def _rated(decay, iclr, w0, a0, log_w, a, count, channels, TILE: tl.constexpr):
    place_R = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there_R, channel_R = place_R < count, place_R % channels
    u_R = tl.load(decay + place_R, there_R, other=0.0).to(tl.float32)
    u_R += tl.load(w0 + channel_R, there_R, other=0.0).to(tl.float32)
    tl.store(log_w + place_R, FLOOR * tl.sigmoid(u_R), there_R)
    u_R = tl.load(iclr + place_R, there_R, other=0.0).to(tl.float32)
    u_R += tl.load(a0 + channel_R, there_R, other=0.0).to(tl.float32)
    tl.store(a + place_R, tl.sigmoid(u_R), there_R)
