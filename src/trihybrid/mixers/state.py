"""What a mixer carries from token to token: typed, sized, saved and restored to the bit.

Legend: B batch, H heads, K key width, V value width, G key/value heads, S stored tokens, D head width; in `ShiftState`
K tokens back, D model width.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class State(Protocol):
    """Anything a mixer takes in and hands out."""

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by name, enough to restore the state to the bit."""
        ...

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        ...


class KeyValues(Protocol):
    """A store of keys and values that attention appends to."""

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor, "KeyValues"]:
        """Stored and new keys and values [B, G, S + T, D], oldest first, and the store that now holds them."""
        ...


def state_bytes(state: State | None) -> int:
    """Bytes of all tensors of a state but scalars, which say what the others mean (0 for None)."""
    return (
        0 if state is None else sum(t.numel() * t.element_size() for t in state.tensors().values() if t.dim())
    )


@dataclass(frozen=True)
class RecurrentState:
    """The matrix of a linear recurrence, [B, H, K, V], float32 (float64 where the inputs are)."""

    matrix_BHKV: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix_BHKV}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(tensors["matrix"])


@dataclass(frozen=True)
class ShiftState:
    """The last inputs of a token shift, [B, K, D], oldest first."""

    last_BKD: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"last": self.last_BKD}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(tensors["last"])


@dataclass(frozen=True)
class KeyValueState:
    """Keys and values of all tokens so far, or of the last `keep` tokens, [B, G, S, D]."""

    keys_BGSD: Tensor
    values_BGSD: Tensor
    keep: int | None = None

    @property
    def length(self) -> int:
        return self.keys_BGSD.shape[2]

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor, "KeyValueState"]:
        keys, values = torch.cat([self.keys_BGSD, k_BGTD], 2), torch.cat([self.values_BGSD, v_BGTD], 2)
        first = 0 if self.keep is None else max(0, keys.shape[2] - self.keep)
        return keys, values, KeyValueState(keys[:, :, first:], values[:, :, first:], self.keep)

    def tensors(self) -> dict[str, Tensor]:
        keep = torch.tensor(-1 if self.keep is None else self.keep)
        return {"keys": self.keys_BGSD, "values": self.values_BGSD, "keep": keep}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> Self:
        keep = int(tensors["keep"])
        return cls(tensors["keys"], tensors["values"], None if keep < 0 else keep)
