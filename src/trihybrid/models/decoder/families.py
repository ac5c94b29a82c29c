"""The families that the decoder hosts as it is: classes that join transformers' model of a teacher with ours.

Model types are "trihybrid_" and the teacher's. What else a family differs in stands in `models/anatomy`.
"""

from collections.abc import Iterable

from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3PreTrainedModel, Gemma3TextModel
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralModel, MistralPreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel, Qwen3MoePreTrainedModel

from trihybrid.models.decoder.config import HybridConfig
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.decoder.model import HybridModel


class TrihybridLlamaConfig(HybridConfig):
    """A Llama teacher (see `HybridConfig`)."""

    model_type = "trihybrid_llama"
    teacher_config = LlamaConfig


class TrihybridLlamaModel(HybridModel, LlamaModel):
    """The decoder."""

    config: TrihybridLlamaConfig


class TrihybridLlamaForCausalLM(HybridForCausalLM, LlamaPreTrainedModel):
    """The language model."""

    config: TrihybridLlamaConfig
    decoder = TrihybridLlamaModel


class TrihybridMistralConfig(HybridConfig):
    """A Mistral teacher (see `HybridConfig`)."""

    model_type = "trihybrid_mistral"
    teacher_config = MistralConfig


class TrihybridMistralModel(HybridModel, MistralModel):
    """The decoder."""

    config: TrihybridMistralConfig


class TrihybridMistralForCausalLM(HybridForCausalLM, MistralPreTrainedModel):
    """The language model."""

    config: TrihybridMistralConfig
    decoder = TrihybridMistralModel


class TrihybridQwen2Config(HybridConfig):
    """A Qwen2 teacher (see `HybridConfig`)."""

    model_type = "trihybrid_qwen2"
    teacher_config = Qwen2Config


class TrihybridQwen2Model(HybridModel, Qwen2Model):
    """The decoder."""

    config: TrihybridQwen2Config


class TrihybridQwen2ForCausalLM(HybridForCausalLM, Qwen2PreTrainedModel):
    """The language model."""

    config: TrihybridQwen2Config
    decoder = TrihybridQwen2Model


class TrihybridQwen3Config(HybridConfig):
    """A Qwen3 teacher (see `HybridConfig`)."""

    model_type = "trihybrid_qwen3"
    teacher_config = Qwen3Config


class TrihybridQwen3Model(HybridModel, Qwen3Model):
    """The decoder."""

    config: TrihybridQwen3Config


class TrihybridQwen3ForCausalLM(HybridForCausalLM, Qwen3PreTrainedModel):
    """The language model."""

    config: TrihybridQwen3Config
    decoder = TrihybridQwen3Model


class TrihybridQwen3MoeConfig(HybridConfig):
    """A Qwen3 teacher with a mixture of experts, left as it is (see `HybridConfig`)."""

    model_type = "trihybrid_qwen3_moe"
    teacher_config = Qwen3MoeConfig


class TrihybridQwen3MoeModel(HybridModel, Qwen3MoeModel):
    """The decoder."""

    config: TrihybridQwen3MoeConfig


class TrihybridQwen3MoeForCausalLM(HybridForCausalLM, Qwen3MoePreTrainedModel):
    """The language model."""

    config: TrihybridQwen3MoeConfig
    decoder = TrihybridQwen3MoeModel


class TrihybridGemma3Config(HybridConfig):
    """A Gemma-3 teacher's text configuration and what stands in each slot (see `HybridConfig`)."""

    model_type = "trihybrid_gemma3"
    teacher_config = Gemma3TextConfig


class TrihybridGemma3Model(HybridModel, Gemma3TextModel):
    """The decoder; global and sliding layers turn by tables of their own."""

    config: TrihybridGemma3Config

    def rotary_tables(
        self, hidden_BTD: Tensor, position_ids: Tensor, layer_types: Iterable[str]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return {kind: self.rotary_emb(hidden_BTD, position_ids, kind) for kind in layer_types}


class TrihybridGemma3ForCausalLM(HybridForCausalLM, Gemma3PreTrainedModel):
    """The language model."""

    config: TrihybridGemma3Config
    decoder = TrihybridGemma3Model
