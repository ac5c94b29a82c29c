"""Rotary positions (arXiv 2104.09864) by their definition: frequencies, tables, and turning the pairs of a head.

Legend: B batch, T time, H heads, N head width, F rotated pairs.
"""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


@torch.library.custom_op("trihybrid::rotary_table", mutates_args=())
def rotary_table(positions_BT: Tensor, frequencies_F: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, both [B, T, 1, F] in the frequencies' dtype.

    An operator of its own, because a compiler would otherwise work out every sine again in each head that is rotated,
    forwards and backwards: a tenth of a small model's step.
    """
    angle_BTF = positions_BT[:, :, None].to(frequencies_F.dtype) * frequencies_F
    return angle_BTF.cos()[:, :, None], angle_BTF.sin()[:, :, None]


@rotary_table.register_fake
def _(positions_BT: Tensor, frequencies_F: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*positions_BT.shape, 1, len(frequencies_F))
    return frequencies_F.new_empty(shape), frequencies_F.new_empty(shape)


def frequencies(
    dims: int, base: float, spacing: int, device: torch.device | None, dtype: torch.dtype
) -> Tensor:
    """base^(-2 j / spacing) for the pairs j = 0 .. dims / 2 - 1, [F]; `spacing` is `dims` in the usual definition."""
    pair_F = torch.arange(dims // 2, device=device, dtype=dtype)
    return base ** (-2 * pair_F / spacing)


def rotate(x_BTHN: Tensor, cosine_BT1F: Tensor, sine_BT1F: Tensor) -> Tensor:
    """Rotate the first 2 F channels, pair j being channels j and j + F (the half-split order); the rest stay."""
    pairs = cosine_BT1F.shape[-1]
    left, right, rest = x_BTHN.split([pairs, pairs, x_BTHN.shape[-1] - 2 * pairs], -1)
    return torch.cat(
        [left * cosine_BT1F + right * sine_BT1F, right * cosine_BT1F - left * sine_BT1F, rest], -1
    )


def normed_rotation_reference(
    x_BTHN: Tensor, gain_H: Tensor | None, cosine_BT1F: Tensor, sine_BT1F: Tensor, epsilon: float
) -> Tensor:
    """The definition; the gain is cast to x's dtype."""
    y_BTHN = rms_norm(x_BTHN, (x_BTHN.shape[-1],), eps=epsilon)
    if gain_H is not None:
        y_BTHN = y_BTHN * gain_H.to(x_BTHN.dtype)[:, None]
    return rotate(y_BTHN, cosine_BT1F, sine_BT1F)
