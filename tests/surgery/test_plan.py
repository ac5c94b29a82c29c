import json

import pytest

from trihybrid.models.shapes import load_shape
from trihybrid.surgery.layout import layout
from trihybrid.surgery.plan import check_plan, config_hash, make_plan
from trihybrid.surgery.section import SurgerySection

GLOBAL = [4, 9, 14, 19, 24, 29, 34]
MIXER = 21_111_296
# Queries and output of 512 channels, keys and values of 256, two norms of 128, a gate of rank 128.
TICA = 2 * 1536 * 512 + 2 * 1536 * 256 + 2 * 128 + (1536 + 512) * 128
MORE = "keys and values that grow with context rise"
LENDS, PREFILL, SCORES = (
    "lends keys and values to layers",
    "gives up that fast prefill",
    "score FLOPs in converted slots",
)
KEPT = "keeps that fast prefill"
NOTHING = "nothing grows with context any more"


@pytest.fixture(scope="module")
def plans() -> dict[str, dict]:
    base = load_shape("gemma-4-e2b")
    sections = {
        "card": SurgerySection(),
        "shared": SurgerySection(share_kv="teacher"),
        "two": SurgerySection(pattern="SSSSR * 2 SSSSF * 5"),
        "upper": SurgerySection(pattern="SSSSR * 2 SSSSF SSSSR * 4"),
        "recurrent": SurgerySection(legend={"S": "sliding", "R": "rwkv7"}),
        "one": SurgerySection(pattern="SSSSF * 6 SSSSR"),
        "lent": SurgerySection(share_kv="teacher", donor_keys_values="share"),
    }
    return {name: make_plan(base, section, "gemma-4-e2b") for name, section in sections.items()}


def test_the_teacher_before(plans) -> None:
    before = plans["card"]["before"]
    assert before["parameters"] == 4_628_569_344
    assert before["global_kv_bytes_per_token"] == 6_144
    assert before["recurrent_state_bytes"] == 0
    assert before["sliding_cache_bytes"] == 6_279_168
    assert all(plan["before"] == before for plan in plans.values())


@pytest.mark.parametrize(
    ("name", "parameters", "growing", "recurrent"),
    [
        ("card", 4_683_544_320, 7_168, 14_680_064),
        ("shared", 4_680_398_080, 3_072, 14_680_064),
        ("two", 4_642_478_336, 2_048 + 2_048, 2 * 2_097_152),
        ("upper", 4_676_589_824, 6 * 1_024 + 2_048, 6 * 2_097_152),
        ("recurrent", 4_683_544_320 - 7 * TICA, 0, 14_680_064),
        ("one", 4_628_569_344 + 21_111_296 - 12_583_424, 3 * 2_048 + 1_024, 2_097_152),
    ],
)
def test_the_student_after(plans, name, parameters, growing, recurrent) -> None:
    after = plans[name]["after"]
    assert after["parameters"] == parameters
    assert after["global_kv_bytes_per_token"] == growing
    assert after["recurrent_state_bytes"] == recurrent
    assert after["sliding_cache_bytes"] == 6_279_168


def test_slots_of_the_cards_plan(plans) -> None:
    layers = plans["card"]["layers"]
    assert [layer["index"] for layer in layers if layer["after"] == ["rwkv7", "tica"]] == GLOBAL
    assert sum(layer["after"] == ["sliding"] for layer in layers) == 28
    assert [layer["parameters_after"] for layer in layers if layer["sources"]] == [MIXER] * 7
    # Layers 19 and above have no key and value projections in the teacher.
    assert [layers[i]["parameters_before"] for i in GLOBAL] == [14_156_800] * 3 + [12_583_424] * 4
    assert plans["recurrent"]["layers"][4]["parameters_after"] == MIXER - TICA


def test_shared_tica_has_no_keys_and_values_of_its_own(plans) -> None:
    layers = plans["shared"]["layers"]
    assert [layers[i]["keys_values"] for i in (14, 19)] == ["rwkv7 own, tica own", "rwkv7 own, tica slot 14"]
    # Two projections of 256 rows and one norm of 128 channels.
    assert layers[14]["parameters_after"] - layers[19]["parameters_after"] == 2 * 256 * 1536 + 128
    assert layers[19]["sources"]["tica.k, v"] == "none: slot 14's, read at run time"
    assert plans["lent"]["layers"][34]["keys_values"] == "rwkv7 slot 14, tica slot 14"
    assert plans["lent"]["layers"][34]["sources"]["rwkv7.key, value"] == "none: slot 14's, read at run time"


def test_score_flops_fall_to_an_eighth(plans) -> None:
    before, after = (plans["card"][side]["score_flops_per_pair"] for side in ("before", "after"))
    assert (before, after) == (7 * 2 * 8 * 512, 7 * 2 * 4 * 128)
    assert before == 8 * after


def test_flops_at_a_context(plans) -> None:
    """From one context to another, only growing attention costs more: 4 width a token (scores and values)."""
    for side, width in (("before", 7 * 4096), ("after", 7 * 512)):
        flops = plans["card"][side]["flops_per_token"]
        assert flops["131072"] - flops["32768"] == 4 * width * (131072 - 32768)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("card", [MORE, LENDS, PREFILL, SCORES]),
        ("shared", [LENDS, PREFILL, SCORES]),
        ("two", [KEPT, SCORES]),
        ("upper", [MORE, LENDS, PREFILL, SCORES]),
        ("recurrent", [NOTHING, LENDS, PREFILL]),
        ("one", [MORE, LENDS, PREFILL, SCORES]),
        ("lent", [PREFILL, SCORES]),
    ],
)
def test_warnings(plans, name, expected) -> None:
    found = plans[name]["warnings"]
    assert len(found) == len(expected)
    assert all(part in warning for part, warning in zip(expected, found, strict=True))


def test_warnings_name_layers_and_numbers(plans) -> None:
    rise, lends, prefill, scores = plans["card"]["warnings"]
    assert "from 6,144 to 7,168 bytes a token" in rise
    assert "layer 14 lends keys and values to layers [19, 24, 29, 34]" in lends
    assert "layers 15 to 34" in prefill and "[19, 24, 29, 34] converted" in prefill
    assert "1/8 of the teacher's score FLOPs" in scores
    # Retained full layers do not blur the ratio of the converted ones.
    kept, ratio = plans["two"]["warnings"]
    assert "layers 15 to 34 of the teacher are kept" in kept
    assert "1/8 of" in ratio


def test_a_plan_is_json_and_reads_back(plans) -> None:
    base = load_shape("gemma-4-e2b")
    for name, plan in plans.items():
        again = json.loads(json.dumps(plan))
        assert again == plan, name
        assert check_plan(again, base).model_dump() == plan["surgery"]
    slots = layout(base, check_plan(plans["shared"], base))
    assert [i for i, slot in enumerate(slots) if slot.converted] == GLOBAL
    assert slots[34].donors == {"tica": 14}


def test_the_hash_knows_the_shape(make_base) -> None:
    assert config_hash(make_base()) == config_hash(make_base())
    assert config_hash(make_base()) == config_hash(type(make_base()).from_dict(make_base().to_dict()))
    others = [
        make_base(num_kv_shared_layers=0),
        make_base(global_head_dim=64),
        make_base(num_key_value_heads=2),
        make_base(sliding_window=9),
        make_base(rms_norm_eps=1e-5),
    ]
    assert len({config_hash(base) for base in [make_base(), *others]}) == 6


def nested(depth: int) -> list:
    """A list in a list in a list, far beyond what a plan holds."""
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: [plan], "not a plan: expected a JSON object"),
        (lambda plan: {k: v for k, v in plan.items() if k != "surgery"}, "not a plan"),
        (lambda plan: plan | {"format": 7}, "plan format is 7; this version reads 1; make the plan again"),
        (
            lambda plan: plan | {"teacher_hash": "0"},
            'made for teacher "tiny", which has another shape; make a new plan',
        ),
        (lambda plan: plan | {"teacher": 5}, "plan: teacher is no string; make the plan again"),
        (
            lambda plan: plan | {"surgery": plan["surgery"] | {"heads": "any"}},
            "plan: surgery.heads: Input should",
        ),
        (
            lambda plan: plan | {"surgery": plan["surgery"] | {"head": 1}},
            "plan: surgery.head: Extra inputs are not permitted; make the plan again",
        ),
        (
            lambda plan: plan | {"surgery": plan["surgery"] | {"share_kv": "teacher"}},
            "plan: after.parameters is .* where .* belongs; the plan was edited or damaged, make it again",
        ),
        (
            lambda plan: {k: v for k, v in plan.items() if k != "layers"},
            "plan: layers is missing; the plan was",
        ),
        (lambda plan: plan | {"layers": []}, r"plan: layers has 0 entries where \d+ belong"),
        (lambda plan: plan | {"layers": nested(500)}, "plan: layers has 1 entries"),
        (lambda plan: plan | {"more": nested(500)}, "plan: more is unknown"),
        (lambda plan: plan | {"after": nested(500)}, "plan: after.flops_per_token is no object with lengths"),
        (
            lambda plan: plan | {"before": plan["before"] | {"parameters": nested(500)}},
            "parameters is a list where",
        ),
        (
            lambda plan: plan | {"after": plan["after"] | {"parameters": 5}},
            r"plan: after.parameters is 5 where \d+ ",
        ),
        (
            lambda plan: plan | {"after": plan["after"] | {"flops_per_token": {"0": 1}}},
            "plan: after.flops_per_token is no object with lengths as keys",
        ),
        (
            lambda plan: plan | {"layers": [plan["layers"][0] | {"after": ["tica"]}, *plan["layers"][1:]]},
            r'plan: layers\[0\].after\[0\] is "tica" where "sliding" belongs',
        ),
    ],
)
def test_foreign_plans_are_refused(make_base, make_section, change, message) -> None:
    plan = make_plan(make_base(), make_section(), "tiny", contexts=(64,))
    with pytest.raises(ValueError, match=message) as caught:
        check_plan(change(plan), make_base())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"donor_keys_values": "ridge"}, "ridge regression of layer 5"),
        ({"donor_keys_values": "copy"}, "layer 5 k_proj and v_proj rows permuted"),
        ({"donor_keys_values": "share"}, "none: slot 5's"),
    ],
)
def test_sources_of_keys_and_values(make_base, make_section, fields, word) -> None:
    plan = make_plan(make_base(), make_section(**fields), "tiny", contexts=(64,))
    assert plan["layers"][8]["sources"]["rwkv7.key, value"].startswith(word)
    assert plan["layers"][5]["sources"]["rwkv7.key, value"].startswith(
        "layer 5 k_proj and v_proj rows permuted"
    )


def test_sources_of_starts_and_order(make_base, make_section) -> None:
    section = make_section(gate="published", start="inherited", heads="plain")
    sources = make_plan(make_base(), section, "tiny", contexts=(64,))["layers"][8]["sources"]
    assert "in plain blocks" in sources["rwkv7.receptance"]
    assert sources["rwkv7.g*"] == "published small gate"
    assert (
        sources["tica.q, k, v"] == "layer 8 q_proj (keys and values: layer 5) blocks without rotary channels"
    )
