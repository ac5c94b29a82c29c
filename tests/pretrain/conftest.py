"""A tiny Gemma-4 shape."""

import pytest


@pytest.fixture
def shape() -> dict:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 4,
        "final_logit_softcapping": 30.0,
        "initializer_range": 0.2,
    }
