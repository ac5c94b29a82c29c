"""A decoder with converted slots: transformers' own model of the teacher's family, with a forward pass of ours.

The residual stream of one layer, with the teacher's parts in round and ours in square brackets:

    ids -> (embedding, scaled in some families) -> h
    for each layer:  h += (post-norm, in some families) of { (attention) | [rwkv7 + tica] } of (norm of h)
                     h += (MLP or experts, with the family's norms) of h;   (Gemma 4: the per-layer input, a scalar)
    last hidden state = (norm of h)

A family's class inherits from `HybridModel` and from transformers' model, and says what its layers need beyond a mask,
a rotary table and positions. Legend: B batch, T tokens, D model width, L layers, P width of the per-layer input.
"""

from collections import UserDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from trihybrid.mixers.contract import Mixer, Shared
from trihybrid.mixers.span import Span, part_of_rows
from trihybrid.models.anatomy import TYPES, anatomy
from trihybrid.models.arguments import build_span, refuse_media
from trihybrid.models.cache import CACHE, given_cache, seen_tokens
from trihybrid.models.decoder.config import HybridConfig
from trihybrid.models.decoder.sliding import SLIDING, Earlier, Mask, window_of_span
from trihybrid.models.decoder.slot import ConvertedSlot
from trihybrid.ops.part import Part

MASKED = ("eager", "sdpa", "flex_attention", SLIDING)
"""Attention implementations that see what their mask says. The others ask the teacher's module for a window, and a full
layer that became a sliding one has none there."""


@dataclass(frozen=True)
class Stream:
    """Everything but the hidden state that the layers of one forward pass read.

    Attributes:
        span: positions, borders and padding, for our mixers.
        masks, rotary: by transformers' layer type, for the teacher's attention.
        position_ids: [B or 1, T].
        cache: transformers cache or None.
        per_layer_BTLP: per-layer inputs, or None for shapes without them.
        shared: what our mixers publish; `shared_attention` is the record of shared keys and values of a teacher that
            shares any.
    """

    span: Span
    masks: dict[str, Mask]
    rotary: dict[str, tuple[Tensor, Tensor]]
    position_ids: Tensor
    cache: Cache | None
    per_layer_BTLP: Tensor | None
    shared: Shared
    shared_attention: UserDict

    def fork(self, below: bool = False) -> "Stream":
        """The same tokens for a second stream of hidden states, with empty records of shared keys and values; `below`
        keeps what the teacher's attentions have shared so far."""
        return replace(
            self, shared=Shared(), shared_attention=UserDict(self.shared_attention if below else {})
        )


class HybridPreTrainedModel(PreTrainedModel):
    """What decoder and language model share: initialisation of our mixers and transformers' flags."""

    config: HybridConfig
    _skip_keys_device_placement = [CACHE, "shared_kv_states", "shared"]
    _can_compile_fullgraph = False
    # A recurrence cannot take tokens back, which assisted decoding needs; transformers refuses it by this flag.
    _is_stateful = True
    input_modalities = ("text",)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for experts in the source of a class, and ours inherits them.
        family: Any = next(c for c in cls.__mro__ if c.__module__.startswith("transformers.models."))
        return family._can_set_experts_implementation()

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


class HybridModel(HybridPreTrainedModel):
    """The decoder. Of the teacher's model it keeps embeddings, layers, rotary tables and the last norm.

    `rotary_tables`, `per_layer` and `layer_arguments` are what a family may say otherwise than most.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config.base())
        self.base = self.config
        self.anatomy = anatomy(self.base)
        # transformers has just chosen an attention for the teacher's configuration; ours has none yet without a head.
        config._attn_implementation = self.base._attn_implementation
        config._experts_implementation = self.base._experts_implementation
        self.config = config
        self.slots = config.slot_list()
        for index, slot in enumerate(self.slots):
            if slot.converted:
                self.layers[index].self_attn = ConvertedSlot(config, index)
        self.fuse(self)
        self.post_init()

    def rotary_tables(
        self, hidden_BTD: Tensor, position_ids: Tensor, layer_types: Iterable[str]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Cosines and sines by attention type; one table for all types unless a family has several."""
        return dict.fromkeys(layer_types, self.rotary_emb(hidden_BTD, position_ids))

    def per_layer(self, input_ids: Tensor | None, hidden_BTD: Tensor, given: Tensor | None) -> Tensor | None:
        """Per-layer inputs [B, T, L, P] of a family that has them, `given` or looked up; None in the others.

        Raises:
            ValueError: some are given to a family without.
        """
        if given is not None:
            raise ValueError(
                f"per_layer_inputs are given, but {self.base.model_type} has none; leave them out"
            )
        return None

    def layer_arguments(self, index: int, stream: Stream) -> dict[str, Any]:
        """What the family's decoder layer takes beside mask, rotary table, positions and cache."""
        return {}

    def fuse(self, module: nn.Module) -> None:
        """Let a part of the family's, in place, do the same in fewer kernels, where there is a way; here there is
        none."""

    def prepare(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        layer_types: Iterable[str] = (),
        part: Part | None = None,
    ) -> tuple[Tensor, Stream]:
        """Embed tokens and build all that the layers read. `layer_types` names attention types that need masks and
        rotary tables beside those of the retained slots: those of a teacher's layers that run in their place. With
        `part` the tokens are this part of rows that lie on several processes, at their `position_ids`.

        Returns:
            hidden states [B, T, D] and the stream.

        Raises:
            ValueError: arguments that do not go together; in parts, rotary frequencies that depend on the length, or an
                attention implementation of transformers' own.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            refuse_media(input_ids, self.config.media_tokens())
        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        per_layer_BTLP = self.per_layer(input_ids, hidden_BTD, per_layer_inputs)
        batch, length = hidden_BTD.shape[:2]
        start = seen_tokens(cache)
        if part is None:
            span = build_span(batch, length, start, attention_mask, position_ids, hidden_BTD.device)
        else:
            if position_ids is None or attention_mask is not None or cache is not None:
                raise ValueError("part: rows in parts want position_ids, and neither a mask nor a cache")
            span = part_of_rows(position_ids.expand(batch, length), part)
        if position_ids is None:
            position_ids = torch.arange(start, start + length, device=hidden_BTD.device)[None]
        retained = [index for index, slot in enumerate(self.slots) if not slot.converted]
        masked = {TYPES[self.slots[index].mixers[0]] for index in retained} | set(layer_types)
        turned = {self.anatomy.attentions[index].layer_type for index in retained} | set(layer_types)
        stream = Stream(
            span,
            self._masks(sorted(masked), hidden_BTD, attention_mask, position_ids, cache, span),
            self.rotary_tables(hidden_BTD, position_ids, sorted(turned)),
            position_ids,
            cache,
            per_layer_BTLP,
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
    ) -> dict[str, Mask]:
        self.base._attn_implementation = self.config._attn_implementation
        self.base._experts_implementation = self.config._experts_implementation
        if any(slot.window for slot in self.slots) and self.config._attn_implementation not in MASKED:
            raise ValueError(
                f'attn_implementation is "{self.config._attn_implementation}"; full layers that became sliding ones '
                f"need one that follows its mask: {', '.join(MASKED)}"
            )
        if span.part is not None:
            self._check_parts()
        whole = cache is None and span.valid_BT is None
        linear = self.config._attn_implementation == SLIDING and whole
        masks: dict[str, Mask] = {}
        for kind in layer_types:
            if linear and kind == "sliding_attention":
                assert self.config.sliding_window is not None
                masks[kind] = window_of_span(span, self.config.sliding_window)
                continue
            if span.part is not None:
                masks[kind] = Earlier(span, span.part)
                continue
            create = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
            masks[kind] = create(
                config=self.config,
                inputs_embeds=hidden_BTD,
                attention_mask=attention_mask,
                position_ids=position_ids,
                layer_idx=None if cache is None or span.borders else self.config.layer_types.index(kind),
                # transformers looks for packed documents only where no cache is given; a packed span starts empty.
                **{CACHE: None if span.borders else cache},
            )
        return masks

    def _check_parts(self) -> None:
        if self.config._attn_implementation != SLIDING:
            raise ValueError(
                f'attn_implementation is "{self.config._attn_implementation}"; rows in parts (context) need "sdpa", in '
                "whose place distillation puts ours: load the models with it"
            )
        kinds = getattr(self.rotary_emb, "rope_type", "default")
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in ("dynamic", "longrope"):
                raise ValueError(
                    f'rope_type is "{kind}", whose frequencies depend on the length of a row, of which a part knows '
                    "only its own; set context to 1"
                )

    def layer(
        self,
        index: int,
        hidden_BTD: Tensor,
        stream: Stream,
        layer: nn.Module | None = None,
        record: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Run layer `index` ([B, T, D] -> [B, T, D]). `layer` puts the teacher's in its place, which sees what the
        teacher's saw; `record` is handed to that layer's attention."""
        teacher = self.anatomy.attentions[index].layer_type
        masked, rotary = teacher, stream.rotary.get(teacher)
        ours: dict[str, Any] = {}
        if layer is None:
            layer = self.layers[index]
            if self.slots[index].converted:
                ours = {"span": stream.span, "shared": stream.shared}
            else:
                masked = TYPES[self.slots[index].mixers[0]]
                if self.config.nope and rotary is not None:
                    rotary = torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        if record is not None:
            ours["record"] = record
        return layer(
            hidden_BTD,
            position_embeddings=rotary,
            attention_mask=stream.masks.get(masked),
            position_ids=stream.position_ids,
            **{CACHE: stream.cache},
            **self.layer_arguments(index, stream),
            **ours,
        )

    def received(self, index: int, y_BTD: Tensor) -> Tensor:
        """What the residual stream receives of an output [B, T, D] of layer `index`'s mixers: through the post-norm of
        families that have one, unchanged in the others."""
        norm = self.anatomy.post_norm
        return y_BTD if norm is None else getattr(self.layers[index], norm)(y_BTD)

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
