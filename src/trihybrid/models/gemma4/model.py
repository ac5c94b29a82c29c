"""Gemma-4 with converted slots as a transformers model: AutoModelForCausalLM, generate, save_pretrained.

The residual stream of one layer, with the teacher's parts in round and ours in square brackets:

    ids -> (embedding * sqrt(D)) -> h          ids -> (per-layer table) + (projection of h) -> p, one slice a layer
    for each layer:  h += (post-norm) of { (attention) | [rwkv7 + tica] } of (norm of h)
                     h += (post-norm) of (MLP) of (norm of h);   h += (norm) of (gate(h) * p_layer);   h *= (scalar)
    logits = softcap (embedding^T (norm of h))

Legend: B batch, T tokens, D model width, V vocabulary, L layers, P width of the per-layer input.
"""

from collections import UserDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4PreTrainedModel,
    Gemma4TextAttention,
    Gemma4TextDecoderLayer,
    Gemma4TextModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from trihybrid.mixers.contract import Mixer, Shared
from trihybrid.mixers.span import Span
from trihybrid.models.arguments import build_span, refuse_media
from trihybrid.models.cache import CACHE, given_cache, seen_tokens
from trihybrid.models.gemma4.config import TrihybridGemma4Config
from trihybrid.models.gemma4.slot import ConvertedDecoderLayer
from trihybrid.ops.divergence import softcap


@dataclass
class Stream:
    """Everything but the hidden state that the layers of one forward pass read.

    Attributes:
        span: positions, borders and padding, for our mixers.
        masks, rotary: by transformers' layer type, for retained attention.
        per_layer_BTLP: per-layer inputs, or None for shapes without them.
        position_ids: [B or 1, T].
        cache: transformers cache or None.
        shared: what our mixers publish; `shared_attention` is the teacher's own record of shared keys and values.
    """

    span: Span
    masks: dict[str, Tensor | None]
    rotary: dict[str, tuple[Tensor, Tensor]]
    per_layer_BTLP: Tensor | None
    position_ids: Tensor
    cache: Cache | None
    shared: Shared
    shared_attention: UserDict

    def fork(self) -> "Stream":
        """The same tokens with empty records of shared keys and values, for a second stream of hidden states."""
        return Stream(
            self.span,
            self.masks,
            self.rotary,
            self.per_layer_BTLP,
            self.position_ids,
            self.cache,
            Shared(),
            UserDict(),
        )


class TrihybridGemma4PreTrainedModel(Gemma4PreTrainedModel):
    """What both classes below share: initialisation of our mixers and transformers' flags."""

    config: TrihybridGemma4Config
    _no_split_modules = ["Gemma4TextDecoderLayer", "ConvertedDecoderLayer"]
    _skip_keys_device_placement = [CACHE, "shared_kv_states", "shared"]
    _can_compile_fullgraph = False
    # A recurrence cannot take tokens back, which assisted decoding needs; transformers refuses it by this flag.
    _is_stateful = True
    input_modalities = ("text",)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for experts in the source of a class, and ours inherits them.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers marks what it has loaded, and `init.copy_` keeps off it; a mixer all loaded draws nothing.
        if isinstance(module, Mixer) and not _all_loaded(module):
            assert module.publishes is not None
            module.initialise(module.publishes, self.config.num_hidden_layers, init.copy_)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Of classes outside of its own package transformers skips modules whose direct parameters are loaded, and would
        # leave a missing norm or projection below them to chance. Ours write through `init`, so nothing needs the skip.
        super()._initialize_weights(module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        """What both of transformers' switches for checkpointing call, with torch's `checkpoint` and its options bound.

        Raises:
            ValueError: reentrant checkpointing. It loses the gradients of keys and values that one layer reads from
                another, without a word: the loss stays right.
        """
        reentrant = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
        if enable and reentrant is not False:
            raise ValueError(
                f"gradient checkpointing with use_reentrant={reentrant} (torch's choice where it is not given) loses "
                'gradients of shared keys and values; give {"use_reentrant": False}, or no options at all'
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)


def _all_loaded(module: nn.Module) -> bool:
    return all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters())


class TrihybridGemma4Model(TrihybridGemma4PreTrainedModel, Gemma4TextModel):
    """The decoder: transformers' own Gemma-4 text model with converted slots swapped in and a forward of ours."""

    _can_record_outputs = {"hidden_states": Gemma4TextDecoderLayer, "attentions": Gemma4TextAttention}

    def __init__(self, config: TrihybridGemma4Config) -> None:
        Gemma4TextModel.__init__(self, config.base())
        self.base = self.config
        # transformers has just chosen an attention for the teacher's configuration; ours has none yet without a head.
        config._attn_implementation = self.base._attn_implementation
        config._experts_implementation = self.base._experts_implementation
        self.config = config
        for index, slot in enumerate(config.slot_list()):
            if slot.converted:
                self.layers[index] = ConvertedDecoderLayer(config, self.base, index)
        self.post_init()

    def prepare(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        layer_types: Iterable[str] | None = None,
    ) -> tuple[Tensor, Stream]:
        """Embed tokens and build all that the layers read. `layer_types` names the attention types that need masks and
        rotary tables; by default those of the retained slots.

        Returns:
            hidden states [B, T, D] and the stream.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            refuse_media(input_ids, self.config.media_tokens())
        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.hidden_size_per_layer_input:
            if per_layer_inputs is None:
                per_layer_inputs = self.get_per_layer_inputs(input_ids, hidden_BTD)
            per_layer_inputs = self.project_per_layer_inputs(hidden_BTD, per_layer_inputs)
        batch, length = hidden_BTD.shape[:2]
        start = seen_tokens(cache)
        span = build_span(batch, length, start, attention_mask, position_ids, hidden_BTD.device)
        if position_ids is None:
            position_ids = torch.arange(start, start + length, device=hidden_BTD.device)[None]
        if layer_types is None:
            layer_types = {
                self.base.layer_types[i]
                for i, slot in enumerate(self.config.slot_list())
                if not slot.converted
            }
        stream = Stream(
            span,
            self._masks(sorted(layer_types), hidden_BTD, attention_mask, position_ids, cache, span),
            {kind: self.rotary_emb(hidden_BTD, position_ids, kind) for kind in sorted(layer_types)},
            per_layer_inputs,
            position_ids,
            cache,
            Shared(),
            UserDict(),
        )
        return hidden_BTD, stream

    def _masks(
        self,
        layer_types: list[str],
        hidden_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        span: Span,
    ) -> dict[str, Tensor | None]:
        self.base._attn_implementation = self.config._attn_implementation
        self.base._experts_implementation = self.config._experts_implementation
        masks = {}
        for kind in layer_types:
            create = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
            masks[kind] = create(
                config=self.base,
                inputs_embeds=hidden_BTD,
                attention_mask=attention_mask,
                position_ids=position_ids,
                layer_idx=None if cache is None or span.borders else self.config.layer_types.index(kind),
                # transformers looks for packed documents only where no cache is given; a packed span starts empty.
                **{CACHE: None if span.borders else cache},
            )
        return masks

    def layer(
        self,
        index: int,
        hidden_BTD: Tensor,
        stream: Stream,
        layer: nn.Module | None = None,
        record: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Run layer `index` ([B, T, D] -> [B, T, D]); `layer` puts another module in its place (a teacher's), and
        `record` is handed to that layer's attention."""
        layer = self.layers[index] if layer is None else layer
        kind = self.base.layer_types[index]
        per_layer = None if stream.per_layer_BTLP is None else stream.per_layer_BTLP[:, :, index]
        ours: dict[str, Any] = (
            {"span": stream.span, "shared": stream.shared} if isinstance(layer, ConvertedDecoderLayer) else {}
        )
        if record is not None:
            ours["record"] = record
        return layer(
            hidden_BTD,
            per_layer,
            shared_kv_states=stream.shared_attention,
            position_embeddings=stream.rotary.get(kind),
            attention_mask=stream.masks.get(kind),
            position_ids=stream.position_ids,
            **{CACHE: stream.cache},
            **ours,
        )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,  # transformers' recording of hidden states passes its flags here
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm, [B, T, D], and the cache, which may be given by either of its names."""
        cache = given_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_BTD, stream = self.prepare(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, per_layer_inputs
        )
        for index in range(self.config.num_hidden_layers):
            hidden_BTD = self.layer(index, hidden_BTD, stream)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BTD), **{CACHE: cache})


class TrihybridGemma4ForCausalLM(TrihybridGemma4PreTrainedModel, GenerationMixin):
    """The language model: decoder, tied head, softcap on the logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    base_model_prefix = "model"

    def __init__(self, config: TrihybridGemma4Config) -> None:
        super().__init__(config)
        self.model = TrihybridGemma4Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        per_layer_inputs: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,  # transformers passes loss and recording arguments through
    ) -> CausalLMOutputWithPast:
        """Softcapped logits [B, T or logits_to_keep, V], the loss on them if `labels` are given, and the cache."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            per_layer_inputs=per_layer_inputs,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = softcap(
            self.lm_head(outputs.last_hidden_state[:, kept]), self.config.final_logit_softcapping
        )
        loss = None if labels is None else self.loss_function(logits_BTV, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Keep the 2-D mask: generate would turn it into 4-D masks for preallocated caches, and a recurrence cannot
        read those. The model builds the 4-D masks of its retained layers itself."""
        return attention_mask
