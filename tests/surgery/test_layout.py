import pytest
from pydantic import ValidationError

from tiny_teachers import WINDOW, teacher_config
from trihybrid.models.anatomy import anatomy
from trihybrid.surgery.layout import layout, rwkv7_sizes, student_config
from trihybrid.surgery.section import Rwkv7Section, SurgerySection

BOTH = ("rwkv7", "tica")


def test_the_default_pattern_converts_every_global_layer(make_base, make_section) -> None:
    slots = layout(make_base(), make_section())
    assert [slot.mixers for slot in slots] == [("sliding",), ("sliding",), BOTH] * 3
    assert all(not slot.donors for slot in slots)


@pytest.mark.parametrize(
    ("fields", "donors"),
    [
        ({"share_kv": "teacher"}, {"tica": 5}),
        ({"donor_keys_values": "share"}, {"rwkv7": 5}),
        ({"share_kv": "teacher", "donor_keys_values": "share"}, {"tica": 5, "rwkv7": 5}),
        ({"donor_keys_values": "ridge"}, {}),
    ],
)
def test_donors_follow_the_sharing_of_the_teacher(make_base, make_section, fields, donors) -> None:
    slots = layout(make_base(), make_section(**fields))
    assert [slot.donors for slot in slots] == [{}] * 8 + [donors]
    assert anatomy(make_base()).owners == [*range(6), 4, 4, 5]


def test_donors_are_given_only_to_the_mixers_of_a_slot(make_base, make_section) -> None:
    legend = {"S": "sliding", "R": ["rwkv7", "tica"], "T": "tica"}
    section = make_section(
        pattern="SSR SSR SST", legend=legend, share_kv="teacher", donor_keys_values="share"
    )
    assert layout(make_base(), section)[8].donors == {"tica": 5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "SSR * 2"}, r'pattern "SSR \* 2" has 6 slots, the model has 9 layers'),
        ({"pattern": "SSR * x"}, r'cannot read .*; write letters and repeats, as "SSSSR \* 7"'),
        ({"pattern": "SSX * 3"}, r'letter "X" is not in the legend \[\'F\', \'R\', \'S\'\]'),
        (
            {"pattern": "SSR SRR SSR"},
            r"slot 4 is a sliding layer .* heads of another size.* rwkv7\+tica; global layers are \[2, 5, 8\]",
        ),
        (
            {"pattern": "SSF SSR SSF"},
            r"slot 8 is retained .* layer 5, which is converted; convert slot 8 too or keep",
        ),
        (
            {"pattern": "SSF SFF SSF"},
            r'slot 4 is "full", the teacher\'s layer is "sliding"; .* keeps the teacher',
        ),
        (
            {"pattern": "SSR SSF SSR", "share_kv": "teacher"},
            r"slot 8: tica would share .* layer 5, .* give slot 5 a tica",
        ),
        (
            {
                "pattern": "SSR SST SSR",
                "legend": {"S": "sliding", "T": "tica", "R": "rwkv7"},
                "donor_keys_values": "share",
            },
            r"slot 8: rwkv7 would share .* give slot 5 a rwkv7, or do not share",
        ),
        ({"legend": {"S": "sliding", "R": ["rwkv7", "rwkv7"]}}, r"must name each mixer once"),
        (
            {"legend": {"S": "sliding", "R": ["rwkv7", "full"]}},
            r"adds to a retained attention; add tica to rwkv7 only",
        ),
        ({"legend": {"S": "sliding", "R": "mamba"}}, r'no mixer "mamba"; choose from'),
    ],
)
def test_layouts_that_cannot_run_are_refused_with_the_cure(make_base, make_section, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        layout(make_base(), make_section(**fields))


def test_blocks_of_the_heads(make_base) -> None:
    assert rwkv7_sizes(make_base(), SurgerySection(rwkv7=Rwkv7Section(head_dim=8)))["heads"] == 16
    sizes = rwkv7_sizes(make_base(num_key_value_heads=2), SurgerySection(rwkv7=Rwkv7Section(head_dim=16)))
    assert (sizes["heads"], sizes["kv_heads"]) == (8, 4)
    assert anatomy(make_base()).template.width == 4 * 32
    with pytest.raises(ValueError, match=r"rwkv7.head_dim is 24; it must divide .*global head width, 32"):
        rwkv7_sizes(make_base(), SurgerySection(rwkv7=Rwkv7Section(head_dim=24)))


def test_rotary_pairs_are_not_cut_apart(make_base) -> None:
    """A quarter of 32 channels is 4 rotary pairs, 8 channels, which fill two blocks of 4; blocks of 1 cut them."""
    assert rwkv7_sizes(make_base(), SurgerySection(rwkv7=Rwkv7Section(head_dim=4)))["heads"] == 32
    with pytest.raises(ValueError, match=r"rwkv7.head_dim is 1, an odd number; .*4 rotary pairs"):
        rwkv7_sizes(make_base(), SurgerySection(rwkv7=Rwkv7Section(head_dim=1)))
    plain = SurgerySection(rwkv7=Rwkv7Section(head_dim=1), heads="plain")
    assert rwkv7_sizes(make_base(), plain)["heads"] == 128


def test_sizes_reach_the_configuration_and_absent_mixers_have_none(make_base, make_section) -> None:
    config = student_config(make_base(), make_section(legend={"S": "sliding", "R": "rwkv7"}))
    assert config.tica is None
    assert config.rwkv7 == {
        "heads": 8, "kv_heads": 2, "head_dim": 16, "decay_rank": 6, "iclr_rank": 5, "gate_rank": 7, "gate": "unit",
    }  # fmt: skip
    config = student_config(make_base(), make_section(legend={"S": "sliding", "R": "tica"}))
    assert config.rwkv7 is None
    assert config.tica == {"heads": 4, "kv_heads": 2, "head_dim": 8, "gate_rank": 3}


@pytest.mark.parametrize(
    "fields",
    [
        {"share_kv": "some"},
        {"ridge": 0.0},
        {"calibration_tokens": 1},
        {"rwkv7": {"head_dim": 0}},
        {"no_such_field": 1},
    ],
)
def test_section_bounds(fields) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        SurgerySection.model_validate(fields)


def test_tica_heads_that_do_not_group_are_refused(make_base, make_section) -> None:
    section = make_section()
    section.tica.kv_heads = 3
    with pytest.raises(ValueError, match=r"tica.heads is 4; it must be a multiple of tica.kv_heads, 3"):
        student_config(make_base(), section).tica_options()


LETTERS = {"S": "sliding", "F": "full", "R": "rwkv7", "B": ["rwkv7", "tica"]}
WINDOWED = {"mixer": "sliding", "window": 5}


def slots_of(name: str, pattern: str | None, **legend: object) -> list:
    return layout(teacher_config(name), SurgerySection(pattern=pattern, legend=LETTERS | legend))


def test_any_layer_with_heads_of_the_converted_size_can_be_converted() -> None:
    assert [slot.mixers for slot in slots_of("qwen3-windowed", "FBRS")] == [
        ("full",), BOTH, ("rwkv7",), ("sliding",),
    ]  # fmt: skip
    assert [slot.mixers for slot in slots_of("mistral-windowed", "RRRS")][:3] == [("rwkv7",)] * 3


def test_a_full_layer_that_becomes_a_sliding_one_has_a_window() -> None:
    """The legend's, or the teacher's; the teacher's own sliding layers have none to name."""
    assert [slot.window for slot in slots_of("llama", "SRSF", S=WINDOWED)] == [5, None, 5, None]
    assert [slot.window for slot in slots_of("gemma3", "SSSF")] == [None, WINDOW, None, None]
    named = {"mixer": "sliding", "window": WINDOW}
    assert [slot.window for slot in slots_of("gemma3", "SSSF", S=named)] == [None, WINDOW, None, None]
    config = student_config(
        teacher_config("llama"), SurgerySection(pattern="SFFF", legend=LETTERS | {"S": WINDOWED})
    )
    assert (config.sliding_window, config.layer_types[0]) == (5, "sliding_attention")
    assert student_config(teacher_config("llama"), SurgerySection(pattern="FFFF")).sliding_window is None


@pytest.mark.parametrize(
    ("name", "pattern", "legend", "message"),
    [
        (
            "llama",
            "SFFF",
            {},
            r'slot 0 is "sliding", the teacher.s layer is "full", and its window is None; give it',
        ),
        (
            "llama",
            "SFFF",
            {"S": {"mixer": "sliding", "window": 0}},
            r"its window is None; give it one in tokens",
        ),
        (
            "llama",
            "SFFF",
            {"S": {"mixer": "sliding", "window": "8"}},
            r"its window is '8'; give it one in tokens",
        ),
        (
            "llama",
            "SFFF",
            {"S": {"mixer": "sliding", "window": -3}},
            r"its window is -3; give it one in tokens",
        ),
        (
            "llama",
            "SFFT",
            {"S": WINDOWED, "T": {"mixer": "sliding", "window": 6}},
            r"windows of \[5, 6\] tokens; all sliding slots of a model share one, .* where it has one \(None\)",
        ),
        ("gemma3", "SSSF", {"S": WINDOWED}, r"windows of \[5, 8\] tokens; .* \(8\)"),
        ("mistral-windowed", "FSSS", {}, r'slot 0 is "full", the teacher.s layer is "sliding"'),
        (
            "mistral-windowed",
            None,
            {},
            r"pattern is none, which converts every global layer, and the teacher has none",
        ),
        ("llama", "RRRR", {}, r"no slot stores keys and values"),
    ],
)
def test_windows_that_cannot_be_are_refused(name, pattern, legend, message) -> None:
    with pytest.raises(ValueError, match=message):
        slots_of(name, pattern, **legend)


def test_a_slot_sees_as_far_as_the_one_whose_keys_and_values_it_reads(make_base) -> None:
    """Layer 8 of the tiny Gemma 4 reads those of layer 5."""
    legend = {"S": "sliding", "F": "full"}
    both = layout(make_base(), SurgerySection(pattern="SSF SSS SSS", legend=legend))
    assert [slot.window for slot in both] == [None] * 5 + [8, None, None, 8]
    for pattern, kinds in (("SSF SSS SSF", "full .* is sliding"), ("SSF SSF SSS", "sliding .* is full")):
        with pytest.raises(ValueError, match=rf"slot 8 is {kinds}; let both be of one kind"):
            layout(make_base(), SurgerySection(pattern=pattern, legend=legend))


def test_heads_no_wider_than_asked_for_map_one_to_one() -> None:
    sizes = rwkv7_sizes(teacher_config("llama"), SurgerySection())
    assert (sizes["heads"], sizes["kv_heads"], sizes["head_dim"]) == (4, 2, 16)
    assert "input_bias" not in sizes and "output_bias" not in sizes
    halved = rwkv7_sizes(teacher_config("llama"), SurgerySection(rwkv7=Rwkv7Section(head_dim=8)))
    assert (halved["heads"], halved["kv_heads"], halved["head_dim"]) == (8, 4, 8)


def test_biases_of_the_teacher_are_biases_of_the_student() -> None:
    qwen, llama = (rwkv7_sizes(teacher_config(n), SurgerySection()) for n in ("qwen2", "llama-biased"))
    assert qwen["input_bias"] and "output_bias" not in qwen
    assert llama["input_bias"] and llama["output_bias"]


def test_students_are_of_their_teachers_family() -> None:
    for name, kind in (("llama", "trihybrid_llama"), ("qwen3-experts", "trihybrid_qwen3_moe")):
        assert student_config(teacher_config(name), SurgerySection()).model_type == kind
