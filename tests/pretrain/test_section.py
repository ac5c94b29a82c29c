import pytest
from pydantic import ValidationError
from transformers import Gemma4ForCausalLM

from trihybrid.pretrain.section import PretrainSection

LOOP = {"loop": {"steps": 1}}


def section_of(shape: dict, **fields: object) -> PretrainSection:
    return PretrainSection.model_validate(LOOP | {"shape": shape} | fields)


def test_the_shape_becomes_a_model_over_the_tokenizers_vocabulary(shape) -> None:
    base = section_of(shape).configuration(61)
    assert (base.vocab_size, base.vocab_size_per_layer_input) == (61, 61)
    assert [base.per_layer_config[i].head_dim for i in range(3)] == [8, 16, 16]
    fields = base.to_dict()
    assert {name: fields[name] for name in shape if name != "global_head_dim"} == {
        name: value for name, value in shape.items() if name != "global_head_dim"
    }
    model = Gemma4ForCausalLM(base)
    assert model.model.embed_tokens.weight.shape == (61, 16)
    assert model.model.embed_tokens_per_layer.weight.shape == (61, 12)


def test_unknown_fields_are_named(shape) -> None:
    with pytest.raises(
        ValueError, match=r"shape: unknown fields \['depth', 'widht'\]; see transformers' Gemma4TextConfig"
    ):
        section_of(shape | {"widht": 1, "depth": 2}).configuration(61)


@pytest.mark.parametrize("name", ["vocab_size", "vocab_size_per_layer_input", "model_type"])
def test_fields_that_are_not_the_shapes_to_give_are_refused(shape, name) -> None:
    with pytest.raises(ValueError, match=rf"shape: {name} is not the shape's to give"):
        section_of(shape | {name: 5}).configuration(61)


@pytest.mark.parametrize(
    "change",
    [
        {"num_kv_shared_layers": 2},
        {"hidden_size": "wide"},
        {"layer_types": ["sliding_attention", "full_attention"]},
    ],
)
def test_shapes_that_cannot_be_are_refused(shape, change) -> None:
    with pytest.raises(ValueError, match=r"^shape: "):
        section_of(shape | change).configuration(61)


@pytest.mark.parametrize("fields", [{"chunk": 0}, {"kind": "align"}, {"shapes": {}}])
def test_section_bounds(shape, fields) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        section_of(shape, **fields)
