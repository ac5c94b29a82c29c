"""The mixer contract: what a module that mixes over time promises to whoever builds models from it.

A mixer is functional: the state goes in and comes out. It owns its mathematics, initialisation, parameter roles, state
and cost. The laws that every mixer obeys ship in `trihybrid.testing`. Legend: B batch, T time, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trihybrid.mixers.span import Span
from trihybrid.mixers.state import State

ROLES = ("matrix", "lowrank", "decay", "vector", "embedding", "head")

Write = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Cost:
    """What one token costs at a given context length.

    Attributes:
        flops: matrix-product FLOPs a token (a multiply and an add count as two).
        state_bytes: bytes of the state that holds `context` tokens, one sequence.
        bytes_read: bytes that decoding one token must read: weights once and the state.
    """

    flops: int
    state_bytes: int
    bytes_read: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops, self.state_bytes + other.state_bytes, self.bytes_read + other.bytes_read
        )


@dataclass
class Shared:
    """What earlier slots published in this forward pass.

    Attributes:
        keys_values: (mixer kind, slot index) -> the keys and values that this mixer used, for slots that declare it as
            their donor. A recurrence publishes those of the new tokens, [B, T, G, N]; an attention all that it can see,
            [B, G, S, D].
        first_values_BTGD: values of the new tokens in the first attention, before any residual, for those that mix them
            in; None until then.
        value_embeddings: slot index -> what the model adds to the values of the new tokens there, [B, T, G, D].
        rotary: (dims, base, spacing, dtype) -> cosines and sines of the new tokens, made by whoever needs them first.
    """

    keys_values: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    first_values_BTGD: Tensor | None = None
    value_embeddings: dict[int, Tensor] = field(default_factory=dict)
    rotary: dict[tuple[int, float, int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)


class Mixer(nn.Module):
    """Base class of the mixers.

    Attributes:
        kind: its word in a pattern: `full`, `sliding`, `rwkv7`, `tica`.
        donor: index of the slot whose published keys and values it reads instead of having its own, or None.
        publishes: index under which it publishes its own keys and values, or None.
    """

    kind: str
    donor: int | None = None
    publishes: int | None = None

    def forward(
        self, x_BTD: Tensor, span: Span, state: State | None, shared: Shared
    ) -> tuple[Tensor, State | None]:
        """Mix [B, T, D] into [B, T, D]. `state` None starts from nothing, and the state after the block is returned."""
        raise NotImplementedError

    def initialise(self, index: int, count: int, write: Write) -> None:
        """Set the parameters of slot `index` of `count`. Every value goes through `write(parameter, value)`, so that a
        loader can protect what it has already filled."""
        raise NotImplementedError

    def roles(self) -> dict[str, str]:
        """Parameter name -> role, one of `ROLES`, for every parameter: weights are matrices, the rest vectors, unless a
        mixer says otherwise."""
        return {
            name: "matrix" if name.endswith("weight") else "vector" for name, _ in self.named_parameters()
        }

    def new_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State | None:
        """The state before the first token. `dtype` is that of keys and values; a recurrence stays float32 or wider.
        None where a donor holds all that the mixer needs."""
        raise NotImplementedError

    def cost(self, context: int) -> Cost:
        """Cost of the token that follows `context - 1` others: keys, values, weights in 2 bytes, recurrences in 4."""
        raise NotImplementedError


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """The plain `write` of `Mixer.initialise`."""
    with torch.no_grad():
        parameter.copy_(value)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in x's dtype: a float32 master weight is cast where it is used."""
    return nn.functional.linear(x, weight.to(x.dtype))


class Projection(nn.Linear):
    """`linear` with a weight of its own, [outputs, inputs], as a module, so that adapters that wrap modules (PEFT) are
    heard.

    Args:
        inputs, outputs: channels.
        scaled: multiply the outputs by a learned `scale` [outputs], by way of the weight's rows: diag(scale) W x.
        bias: add a learned `bias` [outputs] at the end.

    Attributes:
        quantiser: what the weight passes through before it is used, for training that sees its rounded self.
    """

    def __init__(self, inputs: int, outputs: int, scaled: bool = False, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.scale = nn.Parameter(torch.ones(outputs)) if scaled else None
        self.quantiser: nn.Module | None = None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """What x is multiplied with, [outputs, inputs]: the weight, maybe rounded, with its rows scaled."""
        weight = self.weight if self.quantiser is None else self.quantiser(self.weight)
        return (weight if self.scale is None else weight * self.scale[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.matrix(x.dtype), bias)


def low_rank(
    x: Tensor, down: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """activation(x @ down) @ up with raw (in, out) matrices, as the RWKV-7 LoRAs are stored."""
    inner = x @ down.to(x.dtype)
    return (inner if activation is None else activation(inner)) @ up.to(x.dtype)


class HeadNorm(nn.Module):
    """RMS norm over the last dimension, one weight for all heads: x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == self.weight.dtype and not torch.is_grad_enabled():
            return nn.functional.rms_norm(
                x, (x.shape[-1],), self.weight, self.epsilon
            )  # in float32 too, one kernel
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (normed * self.weight.to(wide.dtype)).to(x.dtype)
