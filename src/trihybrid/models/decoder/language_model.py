"""The language model around a converted decoder: AutoModelForCausalLM, generate, save_pretrained.

    logits = head(last hidden state), then c tanh(logits / c) in families with a softcap c

Legend: B batch, T tokens, V vocabulary.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from trihybrid.models.cache import CACHE, given_cache
from trihybrid.models.decoder.config import HybridConfig
from trihybrid.models.decoder.model import HybridModel, HybridPreTrainedModel
from trihybrid.ops.divergence import softcap


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """Decoder, head (tied where the teacher's is), softcap where the teacher has one. A family's class names its
    decoder."""

    decoder: ClassVar[type[HybridModel]]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    base_model_prefix = "model"

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = self.decoder(config)
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
        """Logits [B, T or logits_to_keep, V], softcapped as the teacher's, the loss on them if `labels` are given, and
        the cache."""
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
