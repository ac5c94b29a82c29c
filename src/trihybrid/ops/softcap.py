"""Logits that stay below a bound: Gemma's final softcapping."""

import torch
from torch import Tensor


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(logits / cap) (Gemma's final logit softcapping), or the logits when cap is None.

    Shape and dtype are kept; differentiable. ValueError when cap is not above zero.
    """
    check_softcap(cap)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def check_softcap(cap: float | None) -> None:
    """ValueError unless the cap is above zero, or None."""
    if cap is not None and not cap > 0:
        raise ValueError(f"softcap is {cap}; it must be above 0, or None for no softcap")
