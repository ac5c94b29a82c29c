"""Norms and rotations of transformers' modules, as few operators.

    norm:    x / sqrt(mean(x^2) + eps) * w       w the weight, 1 + weight in Gemma 3, nothing for Gemma 4's values
    rotate:  x cos + (halves of x exchanged) sin, the sine of the first half negated

Legend: B batch, T tokens, H heads, N head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

LENGTH_DEPENDENT = ("dynamic", "longrope")


class Norm:
    """An RMS norm of the model.

    Args:
        module: transformers' norm, whatever its class.
        plus_one: whether its weight is stored as the difference to one.
    """

    def __init__(self, module: Any, plus_one: bool) -> None:
        weight = getattr(module, "weight", None)
        self._epsilon: float = module.eps if hasattr(module, "eps") else module.variance_epsilon
        self._weight = weight + 1 if plus_one and weight is not None else weight

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), self._weight, self._epsilon)


class Rotary:
    """The rotation of one attention type.

    Args:
        module: the model's rotary embedding.
        layer_type: transformers' name of the attention type, for models with a rotation for each.

    Raises:
        ValueError: frequencies that depend on the length of the text.
    """

    def __init__(self, module: nn.Module, layer_type: str) -> None:
        several = hasattr(module, f"{layer_type}_inv_freq")
        prefix = f"{layer_type}_" if several else ""
        kinds: Any = module.rope_type
        kind = kinds[layer_type] if several else kinds
        if kind in LENGTH_DEPENDENT:
            raise ValueError(
                f'rope_type of {layer_type} is "{kind}", whose frequencies depend on the length that was seen; keys in '
                'a store keep theirs. The engine takes fixed ones, as "default", "linear", "llama3", "yarn" and '
                '"proportional"'
            )
        self._frequencies: Tensor = getattr(module, f"{prefix}inv_freq").float()
        self._scale: float = getattr(module, f"{prefix}attention_scaling")

    def table(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [B, T, 1, N]; angles in float32, as transformers'."""
        angle_BT1F = positions_BT[:, :, None, None].float() * self._frequencies
        cosine, sine = angle_BT1F.cos() * self._scale, angle_BT1F.sin() * self._scale
        return torch.cat([cosine, cosine], -1).to(dtype), torch.cat([-sine, sine], -1).to(dtype)


def rotate(x_BTHN: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Heads turned by a `Rotary.table`; pair j is channels j and j + N/2."""
    cosine_BT1N, sine_BT1N = table
    return torch.addcmul(x_BTHN * cosine_BT1N, x_BTHN.roll(x_BTHN.shape[-1] // 2, -1), sine_BT1N)
