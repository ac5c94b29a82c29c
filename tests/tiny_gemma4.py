"""A tiny Gemma-4 teacher with all that the real one has, for the rooms that operate on it."""

from typing import Any

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

VOCABULARY = 97
LAYERS = 9


def base_config(**changes: Any) -> Gemma4TextConfig:
    """Sliding and full layers; the last three share keys and values of layers 4 (sliding) and 5 (full)."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * (LAYERS // 3),
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return Gemma4TextConfig(**(fields | changes))


def build_teacher(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Gemma4ForCausalLM:
    """A teacher whose norms and layer scalars are far from one, so that a tensor that is left behind is found."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = Gemma4ForCausalLM(base_config(**changes)).eval()
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                if "norm" in name:
                    parameter.copy_(0.5 + torch.rand(parameter.shape))
            for name, buffer in teacher.named_buffers():
                if name.endswith("layer_scalar"):
                    buffer.copy_(0.5 + torch.rand(buffer.shape))
                    buffer.data = buffer.data.to(dtype)
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(dtype)
    return teacher
