"""Built-in shapes: gemma-4-e2b is the published one."""

import pytest

from trihybrid.models.gemma4.config import key_value_owner, teacher_kinds
from trihybrid.models.shapes import ALIASES, load_shape, shape_names


def test_every_shape_loads() -> None:
    assert shape_names() == ["gemma-4-e2b"]
    for name in shape_names():
        assert load_shape(name).model_type == "gemma4_text"


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
    full = [index for index, kind in enumerate(teacher_kinds(base)) if kind == "full"]
    assert full == [4, 9, 14, 19, 24, 29, 34]
    owners = [key_value_owner(base, index) for index in range(35)]
    assert owners[:15] == list(range(15))
    assert owners[15:] == [14 if index in full else 13 for index in range(15, 35)]
