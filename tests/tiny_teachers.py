"""Tiny teachers of every family that the decoder hosts, each with all that its real ones have."""

from typing import Any

import torch
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from random_weights import randomise
from trihybrid.models.anatomy import anatomy
from trihybrid.models.decoder.config import HybridConfig
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.families import family_of

VOCABULARY = 97
LAYERS = 4
WINDOW = 8
SLIDING, FULL = "sliding_attention", "full_attention"
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TEACHERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral-windowed": (MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "qwen3-windowed": (
        Qwen3Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [FULL, FULL, SLIDING, SLIDING]},
    ),
    "qwen3-experts": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 20.0,
        },
    ),
}
"""Name -> class and fields."""
RWKV7 = {"head_dim": 8, "decay_rank": 4, "iclr_rank": 5, "gate_rank": 3}
TICA = {"heads": 2, "kv_heads": 1, "head_dim": 8, "gate_rank": 4}
MIXERS = {"R": ["rwkv7"], "B": ["rwkv7", "tica"], "T": ["tica"], "W": ["sliding"]}
"""Letters of a layout; a dot keeps the teacher's attention, W lets it see a window."""


def teacher_config(name: str, **changes: Any) -> PreTrainedConfig:
    kind, fields = TEACHERS[name]
    return kind(**(COMMON | fields | changes))


def build_teacher(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A teacher whose norms and biases are far from their start, so that one that is left behind is found."""
    base = teacher_config(name, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = family_of(base).teacher(base).eval()
        with torch.no_grad():
            for tensor_name, parameter in teacher.named_parameters():
                if "norm" in tensor_name:
                    parameter.copy_(0.5 + torch.rand(parameter.shape))
                elif tensor_name.endswith("bias"):
                    parameter.copy_(0.3 * torch.randn(parameter.shape))
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(dtype)
    return teacher


def student_config(name: str, layout: str, **changes: Any) -> HybridConfig:
    """A student with one letter of `layout` a layer; heads of rwkv7 are half as wide as the teacher's."""
    base = teacher_config(name, **changes)
    body = anatomy(base)
    slots: list[dict[str, Any]] = []
    for letter, kind in zip(layout, body.kinds, strict=True):
        slots.append({"mixers": MIXERS.get(letter, [kind])})
        if letter == "W" and kind == "full":
            slots[-1]["window"] = WINDOW
    biases = {"input_bias": body.input_bias, "output_bias": body.output_bias}
    return family_of(base).student.config_class(
        base_config=base.to_dict(),
        slots=slots,
        rwkv7=RWKV7 | {"heads": 8, "kv_heads": 4} | biases,
        tica=TICA,
    )


def build_student(name: str, layout: str, seed: int = 0, **changes: Any) -> HybridForCausalLM:
    """A student with random weights, in eval mode."""
    config = student_config(name, layout, **changes)
    student = family_of(config.base()).student(config).eval()
    randomise(student, seed)
    return student
