"""Cosines and sines of a forward pass, made once by whoever needs them first.

Legend: B batch, T time, F rotated pairs.
"""

import torch
from torch import Tensor

from trihybrid.mixers.contract import Shared
from trihybrid.mixers.span import Span
from trihybrid.ops.rotary.definition import frequencies, rotary_table


def rotary(
    span: Span, shared: Shared, dims: int, base: float, spacing: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, F] of position times frequency, base^(-2j / spacing) for pair j of F = dims / 2.

    Angles are worked out in float32 (float64 where the dtype is) and rounded to `dtype` at the end. They depend on
    positions inside a document alone.
    """
    key = (dims, base, spacing, dtype)
    if key not in shared.rotary:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        positions_BT = span.positions_BT
        frequency_F = frequencies(dims, base, spacing, positions_BT.device, wide)
        cosine, sine = rotary_table(positions_BT, frequency_F)
        shared.rotary[key] = cosine.to(dtype), sine.to(dtype)
    return shared.rotary[key]
