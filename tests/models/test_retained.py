"""The adapter of retained attention against transformers' own decoder: same masks, same rotary tables, same sharing."""

import pytest
import torch
from transformers import DynamicCache, Gemma4TextConfig, Gemma4TextModel

from trihybrid.mixers.contract import Shared
from trihybrid.mixers.span import contiguous, padded
from trihybrid.mixers.state import RecurrentState
from trihybrid.models.cache import CACHE
from trihybrid.models.gemma4.retained import RetainedAttention
from trihybrid.models.shapes import load_shape
from trihybrid.testing import relative_error


def teacher_config(implementation="sdpa", **changes):
    sizes = {
        "vocab_size": 31,
        "vocab_size_per_layer_input": 31,
        "hidden_size": 24,
        "intermediate_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 4,
        "max_position_embeddings": 64,
    }
    config = Gemma4TextConfig(**{**sizes, **changes})
    config._attn_implementation = implementation
    return config


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", [0, 3])
def test_adapter_equals_the_layers_of_the_teacher(implementation, pad):
    """Inputs and outputs of every attention are recorded while the teacher runs in blocks past its window."""
    config = teacher_config(implementation)
    teacher = Gemma4TextModel(config).eval()
    adapters = [RetainedAttention(config, index) for index in range(6)]
    assert [a.donor for a in adapters] == [None, None, None, None, 3, 2]
    seen = []
    for index, (layer, adapter) in enumerate(zip(teacher.layers, adapters, strict=True)):
        assert adapter.attention.is_kv_shared_layer == (adapter.donor is not None)
        for parameter in layer.self_attn.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        adapter.attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, out, i=index: seen.append((i, kwargs["hidden_states"], out[0])),
            with_kwargs=True,
        )
    ids = torch.randint(0, 31, (2, 15))
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, :pad] = 0
    cache, states = DynamicCache(config=config), [None] * 6
    for start, end in ((0, 8), (8, 9), (9, 13), (13, 14), (14, 15)):
        seen.clear()
        with torch.no_grad():
            teacher(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=(mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:],
                **{CACHE: cache},
            )
            span, shared = padded(mask[:, :end], end - start, start), Shared()
            for (index, x_BTD, expected), adapter in zip(list(seen), adapters, strict=True):
                y_BTD, states[index] = adapter(x_BTD, span, states[index], shared)
                real = mask[:, start:end].bool()
                assert relative_error(y_BTD[real], expected[real]) < 1e-5
    assert [None if s is None else s.length for s in states] == [4, 4, 15, 4, None, None]


@pytest.mark.parametrize("name", ["gemma-4-e2b"])
def test_card_sizes(name):
    base = load_shape(name)
    with torch.device("meta"):
        full, sliding, shared = (RetainedAttention(base, index) for index in (14, 13, 19))
    assert (full.kind, sliding.kind, shared.donor) == ("full", "sliding", 14)
    assert full.cost(1).state_bytes == 2048 and full.cost(1000).state_bytes == 2_048_000
    assert sliding.cost(10_000).state_bytes == 511 * 1024 and shared.cost(1000).state_bytes == 0
    assert full.cost(2).flops - full.cost(1).flops == 4 * 4096
    assert sliding.cost(600).flops == sliding.cost(512).flops


def test_bfloat16_does_not_round_rotary_frequencies():
    adapter = RetainedAttention(teacher_config(), 2)
    before = adapter._frequencies_R.clone()
    adapter.to(torch.bfloat16)
    assert adapter._frequencies_R.dtype == torch.float32 and torch.equal(adapter._frequencies_R, before)


def test_initialise_leaves_the_weights_of_the_teacher():
    adapter = RetainedAttention(teacher_config(), 0)
    adapter.initialise(0, 6, lambda parameter, value: pytest.fail("wrote a retained weight"))


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match='attn_implementation is "flex_attention"'):
        RetainedAttention(teacher_config("flex_attention"), 0)
    with pytest.raises(ValueError, match="tokens see later ones; a teacher is causal"):
        RetainedAttention(teacher_config(use_bidirectional_attention="all"), 0)
    adapter = RetainedAttention(teacher_config(), 0)
    with pytest.raises(ValueError, match="KeyValueState, got RecurrentState"):
        adapter(torch.randn(1, 2, 24), contiguous(1, 2), RecurrentState(torch.zeros(1, 1, 1, 1)), Shared())
