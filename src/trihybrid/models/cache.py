"""States of mixers inside transformers' cache slots.

A slot of type `hybrid` holds one recurrent matrix and one store of keys and values; `linear_attention` the matrix
alone. This file is the only one that knows how transformers spells that. Legend: B batch, G key/value heads, S
stored tokens.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from trihybrid.mixers.contract import Mixer
from trihybrid.mixers.state import RecurrentState, State

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""transformers' name of a cache, in arguments and in outputs: `cache` from 5.24 on, `past_key_values` before."""


def given_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache of a caller who may use either name.

    Raises:
        ValueError: two different ones.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


@dataclass(frozen=True)
class SlotKeyValues:
    """The keys and values of one slot of a transformers cache; `append` writes into the slot, whatever its class
    (dynamic or preallocated), and returns all that it holds."""

    cache: Cache
    index: int

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor, "SlotKeyValues"]:
        keys, values = self.cache.update(k_BGTD, v_BGTD, self.index)
        return keys, values, self


def seen_tokens(cache: Cache | None) -> int:
    """Tokens that a cache already holds, by its first slot that stores keys and values."""
    return 0 if cache is None else int(cache.get_seq_length())


def read_state(cache: Cache | None, index: int, mixer: Mixer) -> Any:
    """The state of `mixer` in slot `index`, or None without a cache or before the first token."""
    if cache is None or (mixer.donor is not None and mixer.kind == "tica"):
        return None
    if mixer.kind == "tica":
        return SlotKeyValues(cache, index)
    slot = cache.layers[index]
    return RecurrentState(slot.recurrent_states[0]) if slot.is_recurrent_states_initialized[0] else None


def write_state(cache: Cache | None, index: int, state: State | None) -> None:
    """Put a recurrent state back into slot `index` (keys and values are already there)."""
    if cache is not None and isinstance(state, RecurrentState):
        cache.update_recurrent_state(state.matrix_BHKV, index)
        # transformers sets this mark only for convolution states; without it a slot counts as empty.
        cache.layers[index].has_previous_state[0] = True


def slot_tensors(cache: Cache, index: int) -> dict[str, Tensor]:
    """What slot `index` holds, cloned: `keys` and `values` [B, G, S, N] of an attention, `matrix` [B, H, K, V] of a
    recurrence; empty before the first token, and for a layer that stores nothing."""
    slot: Any = cache.layers[index] if index < len(cache.layers) else None
    found = {}
    if getattr(slot, "is_initialized", False):
        found = {"keys": slot.keys, "values": slot.values}
    if getattr(slot, "is_recurrent_states_initialized", [False])[0]:
        found["matrix"] = slot.recurrent_states[0]
    return {name: tensor.detach().clone() for name, tensor in found.items() if isinstance(tensor, Tensor)}
