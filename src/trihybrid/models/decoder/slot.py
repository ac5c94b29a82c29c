"""A converted slot: our mixers where the teacher's decoder layer has its attention.

h -> input_layernorm -> [rwkv7] + [tica] -> (post-norm, in some families) -> + h -> all that follows
     (the teacher's)     (ours)              (the teacher's)                       (the teacher's)

The layer around it is transformers' own, of the teacher's class.
"""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from trihybrid.mixers.contract import Mixer, Shared
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.span import Span
from trihybrid.mixers.tica import Tica
from trihybrid.models.cache import given_cache, read_state, write_state
from trihybrid.models.decoder.config import SlotSizes


class ConvertedSlot(nn.Module):
    """The mixers of one slot; their outputs add up. Stands where the decoder layer expects its `self_attn`."""

    def __init__(self, config: SlotSizes, index: int) -> None:
        super().__init__()
        self.index = index
        slots = config.slot_list()
        slot = slots[index]
        for kind in slot.mixers:
            donor = slot.donors.get(kind)
            if kind == "rwkv7":
                first = next(place for place, other in enumerate(slots) if kind in other.mixers)
                self.rwkv7 = Rwkv7(
                    config.rwkv7_options(), index, donor, first=None if first == index else first
                )
            else:
                self.tica = Tica(config.tica_options(), index, donor)

    def mixers(self) -> list[Mixer]:
        return [mixer for mixer in self.children() if isinstance(mixer, Mixer)]

    def mix(self, x_BTD: Tensor, span: Span, shared: Shared, cache: Cache | None) -> Tensor:
        """Sum of the mixers' outputs, [B, T, D]; states are read from the cache's slot and written back."""
        total = None
        for mixer in self.mixers():
            y_BTD, state = mixer(x_BTD, span, read_state(cache, self.index, mixer), shared)
            write_state(cache, self.index, state)
            total = y_BTD if total is None else total + y_BTD
        assert total is not None
        return total

    def forward(
        self,
        hidden_states: Tensor,
        span: Span,
        shared: Shared,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,  # transformers' decoder layer also hands over masks and rotary tables, which no mixer here reads
    ) -> tuple[Tensor, None]:
        return self.mix(hidden_states, span, shared, given_cache(cache, past_key_values)), None
