"""The student's configuration: what it keeps of the teacher, what it tells transformers, what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Gemma4ForCausalLM, Gemma4TextConfig

from trihybrid.models.anatomy import anatomy
from trihybrid.models.decoder.config import COPIED
from trihybrid.models.gemma4 import TrihybridGemma4Config, TrihybridGemma4ForCausalLM

MakeConfig = Callable[..., TrihybridGemma4Config]
MakeTeacher = Callable[..., Gemma4TextConfig]

SLIDING, FULL = {"mixers": ["sliding"]}, {"mixers": ["full"]}
RECURRENT, BOTH = {"mixers": ["rwkv7"]}, {"mixers": ["rwkv7", "tica"]}
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 8, "decay_rank": 4, "iclr_rank": 4, "gate_rank": 4}


@pytest.fixture
def with_slots(teacher_config: MakeTeacher) -> Callable[[dict[int, Any]], TrihybridGemma4Config]:
    """Factory: the teacher's layout with some slots replaced."""

    def make(replaced: dict[int, Any]) -> TrihybridGemma4Config:
        slots: list[Any] = [SLIDING, FULL] * 3
        for index, slot in replaced.items():
            slots[index] = slot
        return TrihybridGemma4Config(
            base_config=teacher_config().to_dict(), slots=slots, rwkv7=SIZES, tica={}
        )

    return make


def test_no_slots_is_the_teacher(teacher_config: MakeTeacher) -> None:
    config = TrihybridGemma4Config(base_config=teacher_config().to_dict())
    assert config.slots == [slot | {"donors": {}} for slot in [SLIDING, FULL] * 3]
    assert config.layer_types == teacher_config().layer_types


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("tica_everywhere", ["hybrid", "hybrid", "hybrid"]),
        ("tica_on_one", ["linear_attention", "hybrid", "linear_attention"]),
        ("rwkv7_only", ["linear_attention", "linear_attention", "linear_attention"]),
        ("tica_shared", ["hybrid", "linear_attention", "linear_attention"]),
        ("rwkv7_shared", ["hybrid", "hybrid", "hybrid"]),
        ("partial", ["hybrid", "full_attention", "full_attention"]),
        ("tica_alone", ["full_attention", "linear_attention", "linear_attention"]),
    ],
)
def test_layer_types_for_transformers_cache(config: MakeConfig, name: str, types: list[str]) -> None:
    sliding = "sliding_attention"
    assert config(name).layer_types == [sliding, types[0], sliding, types[1], sliding, types[2]]


def test_teacher_is_kept_verbatim(config: MakeConfig, teacher_config: MakeTeacher, layout: str) -> None:
    made = config(layout)
    assert made.base_config == teacher_config().to_dict()
    assert made.base().to_dict() == teacher_config().to_dict()
    for name in set(COPIED) - {"head_dim", "hidden_act"} | {"sliding_window", "final_logit_softcapping"}:
        assert getattr(made, name) == getattr(teacher_config(), name)
    assert not hasattr(made, "hidden_act")
    assert made.head_dim == 16


def test_configuration_survives_json(config: MakeConfig, layout: str, tmp_path: Path) -> None:
    made = config(layout)
    made.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is TrihybridGemma4Config
    here = {"transformers_version": "", "_name_or_path": ""}
    assert again.to_dict() | here == made.to_dict() | here
    assert again.slot_list() == made.slot_list()
    assert again.layer_types == made.layer_types


def test_attention_implementation_reaches_the_teacher(config: MakeConfig) -> None:
    made = config("partial")
    made._attn_implementation = "eager"
    assert made.base()._attn_implementation == "eager"


@pytest.mark.parametrize("shared", [0, 1, 2, 4])
def test_owner_of_keys_and_values_is_transformers_own(teacher_config: MakeTeacher, shared: int) -> None:
    """Against the flags of the modules: a sharing layer reads what the storing layer of its type left."""
    base = teacher_config(num_kv_shared_layers=shared)
    attentions = [layer.self_attn for layer in Gemma4ForCausalLM(base).model.layers]
    stored = {a.layer_type: index for index, a in enumerate(attentions) if a.store_full_length_kv}
    for index, attention in enumerate(attentions):
        expected = stored[attention.layer_type] if attention.is_kv_shared_layer else index
        assert anatomy(base).owners[index] == expected


def test_kinds(teacher_config: MakeTeacher) -> None:
    assert anatomy(teacher_config()).kinds == ["sliding", "full"] * 3


@pytest.mark.parametrize("count", [1, 5, 7])
def test_wrong_number_of_slots(teacher_config: MakeTeacher, count: int) -> None:
    with pytest.raises(ValueError, match=f"slots has {count} entries, the teacher has 6 layers"):
        TrihybridGemma4Config(base_config=teacher_config().to_dict(), slots=[SLIDING] * count)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({0: FULL}, 'slot 0 is "full", the teacher\'s layer is "sliding"'),
        ({1: SLIDING}, 'slot 1 is "sliding", the teacher\'s layer is "full"'),
        ({1: {"mixers": []}}, 'slot 1 is "", the teacher\'s layer is "full"'),
        ({1: {"mixers": ["rwkv8"]}}, 'slot 1 is "rwkv8"; a converted slot holds rwkv7, tica or both'),
        (
            {1: {"mixers": ["full", "tica"]}},
            'slot 1 is "full\\+tica"; a converted slot holds rwkv7, tica or both',
        ),
        ({1: {"mixers": ["tica", "tica"]}}, "each once"),
        # Donors: later, itself, negative, without the mixer, itself a reader; of a mixer that is not there.
        (
            {1: BOTH | {"donors": {"tica": 3}}, 3: BOTH, 5: BOTH},
            "slot 1: tica reads keys and values of slot 3",
        ),
        ({5: BOTH | {"donors": {"tica": 5}}}, "slot 5: tica reads keys and values of slot 5"),
        ({5: BOTH | {"donors": {"tica": -1}}}, "slot 5: tica reads keys and values of slot -1"),
        ({1: RECURRENT, 5: BOTH | {"donors": {"tica": 1}}}, "not an earlier slot with a tica of its own"),
        (
            {1: BOTH, 3: BOTH | {"donors": {"tica": 1}}, 5: BOTH | {"donors": {"tica": 3}}},
            "slot 5: tica reads keys and values of slot 3",
        ),
        ({1: BOTH, 5: RECURRENT | {"donors": {"tica": 1}}}, r"slot 5: donors are given for \['tica'\]"),
        ({5: FULL | {"donors": {"full": 3}}}, r"slot 5: donors are given for \['full'\]"),
        # Retained readers of a converted layer, of both types.
        ({3: BOTH}, "slot 5 is retained and reads the keys and values of layer 3, which is converted"),
        ({2: RECURRENT}, "slot 4 is retained and reads the keys and values of layer 2, which is converted"),
        # Nothing by which transformers could count tokens.
        (dict.fromkeys(range(6), RECURRENT), "no slot stores keys and values"),
    ],
)
def test_layouts_that_cannot_run(
    with_slots: Callable[[dict[int, Any]], TrihybridGemma4Config], replaced: dict[int, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with_slots(replaced)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": 5}, "slots is 5; it must be a list, or null"),
        ({"slots": [5] * 6}, 'slots holds 5; a slot is an object as {"mixers"'),
        ({"slots": [{}] * 6}, "slots holds {}; a slot is an object"),
        ({"slots": [{"mixers": "full"}] * 6}, "slots holds {'mixers': 'full'}; a slot"),
        (
            {"slots": [RECURRENT | {"donors": {"rwkv7": "a"}}] * 6},
            "slots holds {'mixers': .* a slot is an object",
        ),
        ({"rwkv7": [4]}, r"rwkv7 is \[4\]; it must be an object, or null"),
        ({"base_config": "x"}, "base_config is 'x'; it must be an object, or null"),
    ],
)
def test_fields_of_another_type_are_refused(
    teacher_config: MakeTeacher, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrihybridGemma4Config.from_dict({"base_config": teacher_config().to_dict()} | fields)


def test_sizes_of_rwkv7_are_needed(teacher_config: MakeTeacher) -> None:
    config = TrihybridGemma4Config(
        base_config=teacher_config().to_dict(), slots=[SLIDING, RECURRENT, SLIDING, FULL, SLIDING, FULL]
    )
    with pytest.raises(ValueError, match='"rwkv7" gives no sizes'):
        TrihybridGemma4ForCausalLM(config)


def test_sizes_out_of_range(config: MakeConfig) -> None:
    made = config("tica_everywhere")
    made.rwkv7 = SIZES | {"kv_heads": 3}
    with pytest.raises(ValueError, match=r"rwkv7\.heads is 4; it must be a multiple of rwkv7\.kv_heads, 3"):
        TrihybridGemma4ForCausalLM(made)
    made.rwkv7, made.tica = SIZES, {"head_dim": 0}
    with pytest.raises(ValueError, match=r"tica\.head_dim is 0; it must be at least 1"):
        TrihybridGemma4ForCausalLM(made)
