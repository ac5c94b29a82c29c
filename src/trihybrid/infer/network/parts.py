"""What stands between the matrix products, as functions of tensors that `Fusion` can fuse.

    norm:    x / sqrt(mean(x^2) + eps) * w       w the weight, 1 + weight in Gemma 3, nothing for Gemma 4's values
    rotate:  x cos + (halves of x exchanged) sin, the sine of the first half negated

Legend: B batch, T tokens, H heads, N head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers.activations import GELUTanh

from trihybrid.infer.network.joining import Owned, join_outputs
from trihybrid.mixers.rwkv7 import Prepare, Rates, prepared
from trihybrid.ops.gated_gelu import gated_gelu
from trihybrid.ops.placed_heads import fusable as placeable
from trihybrid.ops.placed_heads import placed_heads
from trihybrid.ops.rates import rates, rates_reference

LENGTH_DEPENDENT = ("dynamic", "longrope")
Table = tuple[Tensor, Tensor]


class Norm:
    """An RMS norm of the model.

    Args:
        module: transformers' norm, whatever its class.
        plus_one: whether its weight is stored as the difference to one.
    """

    def __init__(self, module: Any, plus_one: bool) -> None:
        weight = getattr(module, "weight", None)
        self.epsilon: float = module.eps if hasattr(module, "eps") else module.variance_epsilon
        # A sum with one would lose digits in half precision.
        self.weight = weight.float() + 1 if plus_one and weight is not None else weight
        if plus_one and weight is not None and weight.dtype == torch.float64:
            self.weight = weight + 1

    def __call__(self, x: Tensor) -> Tensor:
        return normed(x, self.weight, self.epsilon)


def normed(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x behind a norm."""
    if weight is not None and weight.dtype != x.dtype:
        return rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, epsilon).to(x.dtype)
    if x.is_cuda:
        return rms_norm(x, (x.shape[-1],), weight, epsilon)
    # The same on a CPU, where torch's own takes twice the time.
    half = x.dtype.itemsize < 4
    wide = x.float() if half else x
    root = torch.linalg.vecdot(wide, wide).mul_(1 / x.shape[-1]).add_(epsilon).rsqrt_()
    y = wide * root.unsqueeze(-1)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype) if half else y


def added(x: Tensor, y: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x + y, y behind a norm where there is a weight."""
    return x + (y if weight is None else normed(y, weight, epsilon))


def placed(x_BTHN: Tensor, weight: Tensor | None, epsilon: float, table: Table | None) -> Tensor:
    """Heads behind their norm, where there is a weight, and their rotation, where there is a table."""
    if weight is not None:
        x_BTHN = normed(x_BTHN, weight, epsilon)
    return x_BTHN if table is None else rotate(x_BTHN, table)


def gated(gate: Tensor, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) x."""
    return activation(gate) * x


def placed_at_once(x_BTHN: Tensor, weight: Tensor | None, epsilon: float, table: Table | None) -> Tensor:
    """`placed`, by one kernel where there is one."""
    if weight is None or table is None or not placeable(x_BTHN):
        return placed(x_BTHN, weight, epsilon, table)
    return placed_heads(x_BTHN, weight, epsilon, *table)


def gated_at_once(gate: Tensor, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """`gated`, by one kernel where there is one."""
    return gated_gelu(gate, x) if isinstance(activation, GELUTanh) else gated(gate, x, activation)


@dataclass(frozen=True)
class Fusion:
    """The functions above: plain, one kernel each for chunks of any length, or compiled for the few shapes of a step.

    Attributes:
        normed, added, placed, gated: as above.
        prepared: of `mixers.rwkv7`.
        rates: of `ops.rates`.
    """

    normed: Callable[[Tensor, Tensor | None, float], Tensor] = normed
    added: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = added
    placed: Callable[[Tensor, Tensor | None, float, Table | None], Tensor] = placed
    gated: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor] = gated
    prepared: Prepare = prepared
    rates: Rates = rates_reference

    @classmethod
    def of_kernels(cls) -> "Fusion":
        """Ours for heads, the middle of an MLP and rates, which are the largest; the same as plain off the GPU."""
        return cls(placed=placed_at_once, gated=gated_at_once, rates=rates)

    @classmethod
    def compiled(cls) -> "Fusion":
        """All through torch.compile, anew for each shape: more of them than torch would compile unasked."""
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

        def fuse(function: Callable) -> Any:
            return torch.compile(function, dynamic=False)

        return cls(fuse(normed), fuse(added), fuse(placed), fuse(gated), fuse(prepared))


class Joined:
    """Linear maps of one input as a single product. Their weights become views of one tensor, so that nothing is held
    twice; maps of other kinds (quantised ones) are left as they are.

    Args:
        modules: the maps, with biases in all or none.
    """

    def __init__(self, modules: list[Any]) -> None:
        self._modules, self._weight, self._bias = modules, None, None
        if len(modules) < 2 or not all(_plain(module) for module in modules):
            return
        self._sizes = [module.weight.shape[0] for module in modules]
        self._weight = join_outputs([Owned(module, "weight") for module in modules])
        biases = [module.bias.detach() for module in modules if module.bias is not None]
        self._bias = torch.cat(biases) if biases else None

    @property
    def weight(self) -> Tensor:
        """Of the single product, or of the only map. ValueError where several maps are left as they are."""
        if self._weight is not None:
            return self._weight
        if len(self._modules) > 1:
            raise ValueError("maps of other kinds than nn.Linear have no weight in common")
        return self._modules[0].weight

    def __call__(self, x: Tensor) -> list[Tensor]:
        if self._weight is None:
            return [module(x) for module in self._modules]
        return list(linear(x, self._weight, self._bias).split(self._sizes, -1))


def _plain(module: Any) -> bool:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


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

    def table(self, positions_BT: Tensor, dtype: torch.dtype) -> Table:
        """Cosines and signed sines [B, T, 1, N]; angles in float32, as transformers'."""
        angle_BT1F = positions_BT[:, :, None, None].float() * self._frequencies
        cosine, sine = angle_BT1F.cos() * self._scale, angle_BT1F.sin() * self._scale
        return torch.cat([cosine, cosine], -1).to(dtype), torch.cat([-sine, sine], -1).to(dtype)


def rotate(x_BTHN: Tensor, table: Table) -> Tensor:
    """Heads turned by a `Rotary.table`; pair j is channels j and j + N/2."""
    cosine_BT1N, sine_BT1N = table
    return torch.addcmul(x_BTHN * cosine_BT1N, x_BTHN.roll(x_BTHN.shape[-1] // 2, -1), sine_BT1N)
