"""The token shift: every token beside the ones just before it.

Legend: B batch, T time, D model width, K tokens back.
"""

import torch
from torch import Tensor


def token_shift(x_BTD: Tensor, before_BKD: Tensor | None, positions_BT: Tensor, back: int = 1) -> Tensor:
    """x[t - back], and zero where that is another document or nothing: the x^- of RWKV (arXiv 2305.13048, section 3.1).

    Args:
        x_BTD: a block of tokens, any dtype.
        before_BKD: the K >= back tokens before the block, oldest first; None when it begins the documents.
        positions_BT: int64, 0 at the first token of a document.
        back: how many tokens to look back, at least 1.

    Returns:
        [B, T, D] in x's dtype.
    """
    length = x_BTD.shape[1]
    if before_BKD is None:
        shifted_BTD = torch.nn.functional.pad(x_BTD, (0, 0, back, 0))[:, :length]
    else:
        first = before_BKD.shape[1] - back
        shifted_BTD = torch.cat([before_BKD, x_BTD], 1)[:, first : first + length]
    zero = torch.zeros((), dtype=x_BTD.dtype, device=x_BTD.device)
    return torch.where((positions_BT >= back)[:, :, None], shifted_BTD, zero)


def last_tokens(x_BTD: Tensor, before_BKD: Tensor | None, count: int) -> Tensor:
    """The last `count` tokens seen, [B, count, D]: what `token_shift` needs before the next block. Zeros stand for
    tokens that never were."""
    if before_BKD is None:
        before_BKD = x_BTD.new_zeros(x_BTD.shape[0], count, x_BTD.shape[2])
    return torch.cat([before_BKD, x_BTD], 1)[:, -count:]
