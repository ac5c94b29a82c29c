"""A small student with every kind of cache slot, random, its TICA not silent."""

import torch
from transformers import Gemma4TextConfig

from trihybrid.models.gemma4 import TrihybridGemma4Config, TrihybridGemma4ForCausalLM

SLOTS = [
    {"mixers": ["sliding"]},
    {"mixers": ["rwkv7", "tica"]},
    {"mixers": ["sliding"]},
    {"mixers": ["rwkv7", "tica"], "donors": {"tica": 1}},
    {"mixers": ["sliding"]},
    {"mixers": ["rwkv7"]},
]


def make_student(vocabulary: int = 61) -> TrihybridGemma4ForCausalLM:
    """Sliding layers, and recurrences of both kinds of cache slots, one with shared keys and values."""
    base = Gemma4TextConfig(
        vocab_size=vocabulary,
        vocab_size_per_layer_input=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=4,
        final_logit_softcapping=30.0,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    config = TrihybridGemma4Config(
        base_config=base.to_dict(),
        slots=[dict(slot) for slot in SLOTS],
        rwkv7={"heads": 4, "kv_heads": 2, "head_dim": 8, "decay_rank": 3, "iclr_rank": 3, "gate_rank": 3},
        tica={"heads": 2, "kv_heads": 1, "head_dim": 8, "gate_rank": 3},
    )
    torch.manual_seed(0)
    model = TrihybridGemma4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.weight"):
                parameter.normal_(std=0.3)
    return model
