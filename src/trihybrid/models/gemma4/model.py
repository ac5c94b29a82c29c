"""Gemma-4 with converted slots: the decoder of `models/decoder` with per-layer inputs and shared keys and values.

    ids -> (embedding * sqrt(D)) -> h          ids -> (per-layer table) + (projection of h) -> p, one slice a layer
    each layer after attention and MLP:        h += (norm) of (gate(h) * p_layer);   h *= (scalar)

Legend: B batch, T tokens, D model width, L layers, P width of the per-layer input.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4PreTrainedModel,
    Gemma4TextAttention,
    Gemma4TextDecoderLayer,
    Gemma4TextModel,
)

from trihybrid.models.decoder.config import HybridConfig
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.decoder.model import HybridModel, Stream


class TrihybridGemma4Config(HybridConfig):
    """A Gemma-4 teacher's text configuration and what stands in each slot (see `HybridConfig`)."""

    model_type = "trihybrid_gemma4"
    teacher_config = Gemma4TextConfig


class TrihybridGemma4Model(HybridModel, Gemma4TextModel):
    """The decoder."""

    config: TrihybridGemma4Config
    _no_split_modules = ["Gemma4TextDecoderLayer"]
    _can_record_outputs = {"hidden_states": Gemma4TextDecoderLayer, "attentions": Gemma4TextAttention}

    def rotary_tables(
        self, hidden_BTD: Tensor, position_ids: Tensor, layer_types: Iterable[str]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return {kind: self.rotary_emb(hidden_BTD, position_ids, kind) for kind in layer_types}

    def per_layer(self, input_ids: Tensor | None, hidden_BTD: Tensor, given: Tensor | None) -> Tensor | None:
        if not self.hidden_size_per_layer_input:
            return super().per_layer(input_ids, hidden_BTD, given)
        looked_up = self.get_per_layer_inputs(input_ids, hidden_BTD) if given is None else given
        return self.project_per_layer_inputs(hidden_BTD, looked_up)

    def layer_arguments(self, index: int, stream: Stream) -> dict[str, Any]:
        inputs_BTLP = stream.per_layer_BTLP
        return {
            "per_layer_input": None if inputs_BTLP is None else inputs_BTLP[:, :, index],
            "shared_kv_states": stream.shared_attention,
        }


class TrihybridGemma4ForCausalLM(HybridForCausalLM, Gemma4PreTrainedModel):
    """The language model: decoder, tied head, softcap on the logits."""

    config: TrihybridGemma4Config
    decoder = TrihybridGemma4Model
    _no_split_modules = ["Gemma4TextDecoderLayer"]
