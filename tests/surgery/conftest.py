"""A tiny Gemma-4 teacher with all that the real one has, and surgery sections that fit it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from trihybrid.surgery.section import Rwkv7Section, SurgerySection, TicaSection

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


def build_section(gate: str = "unit", start: str = "fresh", **fields: Any) -> SurgerySection:
    """Blocks of 16 channels; every rank differs from every width."""
    return SurgerySection(
        rwkv7=Rwkv7Section(head_dim=16, decay_rank=6, iclr_rank=5, gate_rank=7, gate=gate),
        tica=TicaSection(heads=4, kv_heads=2, head_dim=8, gate_rank=3, start=start),
        **fields,
    )


@pytest.fixture(scope="session")
def make_section() -> Callable[..., SurgerySection]:
    return build_section


@pytest.fixture(scope="session")
def make_base() -> Callable[..., Gemma4TextConfig]:
    return base_config


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., Gemma4ForCausalLM]:
    return build_teacher


@pytest.fixture(scope="session")
def calibration() -> tuple[Tensor, Tensor]:
    """Two rows of two packed documents each: token ids and restarting positions, [2, 40]."""
    generator = torch.Generator().manual_seed(7)
    tokens_BT = torch.randint(3, VOCABULARY, (2, 40), generator=generator)
    positions_BT = torch.cat([torch.arange(17), torch.arange(40 - 17)])[None].expand(2, -1)
    return tokens_BT, positions_BT
