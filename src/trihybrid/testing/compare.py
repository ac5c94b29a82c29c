"""When two tensors count as equal: a relative rms error against a tolerance for each dtype."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative error that still counts as equal. In bfloat16 the reference is fed the same rounded inputs."""

FLOOR = 1e-6
"""A reference whose rms is below this counts as having this rms."""


def relative_error(x: Tensor, reference: Tensor) -> float:
    """norm(x - reference) / max(norm(reference), 1e-6 sqrt(n)) over all n elements, computed in float64.

    Any dtypes and devices; 0 for empty tensors; NaN when either holds a NaN, so compare with `not error <= tolerance`.

    Raises:
        ValueError: shapes that differ.
    """
    if x.shape != reference.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, the reference {tuple(reference.shape)}; they must be equal"
        )
    if not x.numel():
        return 0.0
    wide, wide_reference = x.detach().double().cpu(), reference.detach().double().cpu()
    scale = torch.maximum(wide_reference.norm(), torch.tensor(FLOOR * x.numel() ** 0.5, dtype=torch.float64))
    return float((wide - wide_reference).norm() / scale)
