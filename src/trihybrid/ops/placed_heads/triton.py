"""The kernel of `placed_heads`: tiles of whole heads. A channel's partner in its pair is loaded again rather than
exchanged between threads: it is in the cache.

Legend: R heads of a tile, N head width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # channels


def forward(
    x_BTHN: Tensor, weight_N: Tensor, epsilon: float, cosine_BT1N: Tensor, sine_BT1N: Tensor
) -> Tensor:
    """Heads behind norm and rotation, contiguous. Cosines and sines contiguous, of x's dtype."""
    heads, width = x_BTHN.shape[2:]
    x_MHN = x_BTHN.flatten(0, 1)
    y_BTHN = torch.empty(x_BTHN.shape, dtype=x_BTHN.dtype, device=x_BTHN.device)
    count = x_MHN.shape[0] * heads
    if count:
        _placed[(triton.cdiv(count, TILE // width),)](
            x_MHN, weight_N, cosine_BT1N, sine_BT1N, y_BTHN, count, x_MHN.stride(0), epsilon, HEADS=heads,
            WIDTH=width, ROWS=TILE // width, num_warps=4,
        )  # fmt: skip
    return y_BTHN


@triton.jit(do_not_specialize=["count"])
def _placed(
    x, weight, cosine, sine, y, count, stride, epsilon, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_R1 = (row_R < count)[:, None]
    token_R = (row_R // HEADS).to(tl.int64)
    own_N = tl.arange(0, WIDTH)
    # The compiler does not see that these run on in steps of one, and would load channel by channel.
    half: tl.constexpr = WIDTH // 2
    partner_N = tl.where(own_N < half, own_N + half, own_N - half)
    partner_N = tl.max_contiguous(tl.multiple_of(partner_N, 8), 8)
    head_R1 = (x + token_R * stride + (row_R % HEADS) * WIDTH)[:, None]
    x_RN = tl.load(head_R1 + own_N[None, :], mask=inside_R1, other=0.0).to(tl.float32)
    partner_RN = tl.load(head_R1 + partner_N[None, :], mask=inside_R1, other=0.0).to(tl.float32)
    factor_R = tl.rsqrt(tl.sum(x_RN * x_RN, 1) / WIDTH + epsilon)
    x_RN *= tl.load(weight + own_N).to(tl.float32)[None, :]
    partner_RN *= tl.load(weight + partner_N).to(tl.float32)[None, :]
    at_RN = token_R[:, None] * WIDTH + own_N[None, :]
    cosine_RN = tl.load(cosine + at_RN, mask=inside_R1, other=0.0).to(tl.float32)
    sine_RN = tl.load(sine + at_RN, mask=inside_R1, other=0.0).to(tl.float32)
    y_RN = (x_RN * cosine_RN + partner_RN * sine_RN) * factor_R[:, None]
    at_RN = row_R.to(tl.int64)[:, None] * WIDTH + own_N[None, :]
    tl.store(y + at_RN, y_RN.to(y.dtype.element_ty), mask=inside_R1)
