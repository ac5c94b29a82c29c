"""Built-in shapes are the published ones; their sizes are checked in the room that counts them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig

from trihybrid.models.anatomy import anatomy
from trihybrid.models.checkpoint import load_teacher_config
from trihybrid.models.shapes import ALIASES, load_shape, shape_names


def test_every_shape_loads() -> None:
    gemma3 = [f"gemma-3-{size}" for size in ("12b", "1b", "27b", "4b")]
    gemma4 = [f"gemma-4-{size}" for size in ("12b", "26b-a4b", "31b", "e2b", "e4b")]
    others = {
        "llama-3.2-1b": "llama",
        "mistral-7b-v0.3": "mistral",
        "qwen3-1.7b": "qwen3",
        "qwen3-8b": "qwen3",
    }
    assert shape_names() == gemma3 + gemma4 + sorted(others)
    assert [load_shape(name).model_type for name in shape_names()] == ["gemma3_text"] * 4 + [
        "gemma4_text"
    ] * 5 + list(others.values())
    assert {*ALIASES.values()} == {*shape_names()}
    assert ALIASES["google/gemma-4-26B-A4B-it"] == "gemma-4-26b-a4b"
    assert ALIASES["meta-llama/Llama-3.2-1B-Instruct"] == "llama-3.2-1b"


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_alias_is_the_shape_itself(alias: str) -> None:
    assert load_shape(alias).to_dict() == load_shape(ALIASES[alias]).to_dict()


def test_name_is_read_in_any_case() -> None:
    assert load_shape("Gemma-4-E2B").to_dict() == load_shape("gemma-4-e2b").to_dict()


def test_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r'no built-in shape "gemma-5".*gemma-4-e2b.*config\.json'):
        load_shape("gemma-5")


def test_e2b_is_not_the_class_default() -> None:
    """Trap: Gemma4TextConfig() is a 30-layer model of width 2304 without sharing."""
    base = load_shape("gemma-4-e2b")
    assert (base.num_hidden_layers, base.hidden_size, base.intermediate_size) == (35, 1536, 6144)
    assert (base.num_attention_heads, base.num_key_value_heads) == (8, 1)
    assert base.per_layer_config["sliding_attention"].head_dim == 256
    assert base.per_layer_config["full_attention"].head_dim == 512
    assert base.use_double_wide_mlp
    assert base.final_logit_softcapping == 30.0
    assert base.rope_parameters["full_attention"]["partial_rotary_factor"] == 0.25


def test_e2b_full_layers_and_donors() -> None:
    """Trap: layers 15 to 34 read 13 (sliding) and 14 (full), never keys and values of their own."""
    base = load_shape("gemma-4-e2b")
    full = [index for index, kind in enumerate(anatomy(base).kinds) if kind == "full"]
    assert full == [4, 9, 14, 19, 24, 29, 34]
    owners = anatomy(base).owners
    assert owners[:15] == list(range(15))
    assert owners[15:] == [14 if index in full else 13 for index in range(15, 35)]


def test_e4b_full_layers_and_donors() -> None:
    """The last 18 of 42 layers read 22 (sliding) and 23 (full); no layer is double-wide."""
    base = load_shape("gemma-4-e4b")
    full = [index for index, kind in enumerate(anatomy(base).kinds) if kind == "full"]
    assert full == [5, 11, 17, 23, 29, 35, 41]
    owners = anatomy(base).owners
    assert owners == list(range(24)) + [23 if index in full else 22 for index in range(24, 42)]
    assert (base.hidden_size, base.num_attention_heads, base.sliding_window) == (2560, 8, 512)
    assert not base.use_double_wide_mlp


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "local", "wide"),
    [
        ("gemma-4-12b", 48, 3840, 16, 8, 1),
        ("gemma-4-26b-a4b", 30, 2816, 16, 8, 2),
        ("gemma-4-31b", 60, 5376, 32, 16, 4),
    ],
)
def test_large_sizes_have_keys_for_values_and_neither_sharing_nor_per_layer_inputs(
    name: str, layers: int, width: int, heads: int, local: int, wide: int
) -> None:
    base = load_shape(name)
    assert (base.num_hidden_layers, base.hidden_size, base.num_attention_heads) == (layers, width, heads)
    kinds = anatomy(base).kinds
    assert [index for index, kind in enumerate(kinds) if kind == "full"] == list(range(5, layers, 6))
    sliding, full = (base.per_layer_config[f"{kind}_attention"] for kind in ("sliding", "full"))
    assert (sliding.num_key_value_heads, sliding.head_dim) == (local, 256)
    assert (full.num_key_value_heads, full.head_dim) == (wide, 512)
    assert base.attention_k_eq_v and base.use_bidirectional_attention == "vision"
    assert (base.hidden_size_per_layer_input, base.sliding_window) == (0, 1024)
    assert anatomy(base).owners == list(range(layers))
    assert base.enable_moe_block == (name == "gemma-4-26b-a4b")


@pytest.mark.parametrize(
    ("name", "layers", "heads", "groups", "width", "scale", "factor"),
    [
        ("gemma-3-1b", 26, 4, 1, 256, 256, None),
        ("gemma-3-4b", 34, 8, 4, 256, 256, 8.0),
        ("gemma-3-12b", 48, 16, 8, 256, 256, 8.0),
        ("gemma-3-27b", 62, 32, 16, 128, 168, 8.0),
    ],
)
def test_gemma_3_has_one_kind_of_head(
    name: str, layers: int, heads: int, groups: int, width: int, scale: int, factor: float | None
) -> None:
    base = load_shape(name)
    assert (base.num_hidden_layers, base.num_attention_heads, base.num_key_value_heads) == (
        layers,
        heads,
        groups,
    )
    assert (base.head_dim, base.query_pre_attn_scalar) == (width, scale)
    assert base.rope_parameters["full_attention"].get("factor") == factor
    assert anatomy(base).kinds.count("full") == layers // 6
    # Unlike in Gemma 4, the last layer may be a sliding one.
    assert anatomy(base).kinds[-1] == ("full" if layers % 6 == 0 else "sliding")
    assert anatomy(base).owners[layers - 1] == layers - 1


@pytest.mark.parametrize(
    ("name", "layers", "width", "inner", "heads", "groups", "channels", "vocabulary", "tied"),
    [
        ("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128_256, True),
        ("mistral-7b-v0.3", 32, 4096, 14_336, 32, 8, 128, 32_768, False),
        ("qwen3-1.7b", 28, 2048, 6144, 16, 8, 128, 151_936, True),
        ("qwen3-8b", 36, 4096, 12_288, 32, 8, 128, 151_936, False),
    ],
)
def test_shapes_of_other_families(
    name, layers, width, inner, heads, groups, channels, vocabulary, tied
) -> None:
    base = load_shape(name)
    assert (base.num_hidden_layers, base.hidden_size, base.intermediate_size) == (layers, width, inner)
    assert (base.vocab_size, base.tie_word_embeddings) == (vocabulary, tied)
    body = anatomy(base)
    assert body.kinds == ["full"] * layers and body.window is None
    assert {attention.sizes for attention in body.attentions} == {(heads, groups, channels)}
    assert not body.input_bias and not body.output_bias
    theta = {"llama": 5e5, "mistral": 1e6, "qwen3": 1e6}[base.model_type]
    assert base.rope_parameters["rope_theta"] == theta
    if name == "llama-3.2-1b":
        assert base.rope_parameters["rope_type"] == "llama3" and base.rope_parameters["factor"] == 32.0


@torch.no_grad()
def test_the_text_model_of_the_unified_12b_is_a_gemma_4(tmp_path: Path) -> None:
    """The folder names a class of its own; the configuration that we read of it computes the same, to the bit."""
    unified = Gemma4UnifiedTextConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        head_dim=8,
        global_head_dim=16,
        attention_k_eq_v=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=4,
        final_logit_softcapping=30.0,
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma4_unified", "text_config": unified.to_dict()})
    )
    base = load_teacher_config(str(tmp_path))
    assert (base.model_type, base.max_position_embeddings) == ("gemma4_text", 262_144)
    theirs, ours = Gemma4UnifiedForCausalLM(unified).eval(), Gemma4ForCausalLM(base).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tokens = torch.randint(0, 31, (2, 13))
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
