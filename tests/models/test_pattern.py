"""Patterns: what is read, what is refused."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.models.pattern import KINDS, LegendEntry, Slot, parse_pattern, read_slots

LEGEND: dict[str, LegendEntry] = {"S": "sliding", "F": "full", "R": ["rwkv7", "tica"], "T": {"mixer": "tica"}}


def test_e2b_pattern() -> None:
    slots = parse_pattern("SSSSR * 7", LEGEND, 35)
    assert [index for index, slot in enumerate(slots) if slot.converted] == [4, 9, 14, 19, 24, 29, 34]
    assert slots[4] == Slot(("rwkv7", "tica"))
    assert slots[0] == Slot(("sliding",))


@pytest.mark.parametrize("pattern", ["SSR*2 ST", "SSRSSRST", "SSR SSR ST", " SSR  *  2   ST ", "SSR*1SSRST"])
def test_spellings_of_one_layout(pattern: str) -> None:
    slots = parse_pattern(pattern, LEGEND, 8)
    assert (
        "".join({"sliding": "S", "rwkv7": "R", "tica": "T"}[slot.mixers[0]] for slot in slots) == "SSRSSRST"
    )


@given(
    groups=st.lists(
        st.tuples(st.text("SFRT", min_size=1, max_size=4), st.integers(0, 5)), min_size=1, max_size=4
    )
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_repeats_are_repetition(groups: list[tuple[str, int]]) -> None:
    written = " ".join(f"{letters} * {count}" for letters, count in groups)
    plain = "".join(letters * count for letters, count in groups)
    if plain:
        assert parse_pattern(written, LEGEND, len(plain)) == parse_pattern(plain, LEGEND, len(plain))
    with pytest.raises(ValueError, match=f"has {len(plain)} slots, the model has {len(plain) + 1} layers"):
        parse_pattern(written, LEGEND, len(plain) + 1)


@pytest.mark.parametrize(
    ("pattern", "layers", "message"),
    [
        ("SSSR * 7", 35, r"has 28 slots, the model has 35 layers"),
        ("", 1, r"write letters and repeats"),
        ("(SR)*2", 4, r"cannot read"),
        ("S*-1", 1, r"cannot read"),
        ("SX", 2, r'letter "X" is not in the legend'),
    ],
)
def test_unreadable_patterns(pattern: str, layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pattern(pattern, LEGEND, layers)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("rwkv8", 'no mixer "rwkv8"; choose from'),
        (["rwkv7", "rwkv7"], "must name each mixer once"),
        ([], "must name each mixer once"),
        (["sliding", "tica"], "adds to a retained attention"),
        (["full", "sliding"], "adds to a retained attention"),
        ({"mixer": "tica", "window": 8}, 'takes "mixer" and no other'),
        ({}, 'and no "mixer"; name one'),
    ],
)
def test_legend_entries_that_are_refused(entry: LegendEntry, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pattern("A", {"A": entry}, 1)


@given(
    mixers=st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True),
    donor=st.none() | st.integers(0, 40),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_slot_survives_json(mixers: list[str], donor: int | None) -> None:
    slot = Slot(tuple(mixers), {} if donor is None else {mixers[0]: donor})
    assert Slot.from_dict(json.loads(json.dumps(slot.as_dict()))) == slot


@pytest.mark.parametrize(
    ("slot", "converted", "grows"),
    [
        (Slot(("sliding",)), False, False),
        (Slot(("full",)), False, True),
        (Slot(("rwkv7",)), True, False),
        (Slot(("tica",)), True, True),
        (Slot(("rwkv7", "tica")), True, True),
        (Slot(("rwkv7", "tica"), {"tica": 0}), True, False),
        (Slot(("rwkv7", "tica"), {"rwkv7": 0}), True, True),
    ],
)
def test_what_a_slot_stores(slot: Slot, converted: bool, grows: bool) -> None:
    assert (slot.converted, slot.grows) == (converted, grows)


OPTIONS = {"sliding": frozenset({"window", "xsa"}), "full": frozenset({"xsa"})}


def test_options_reach_their_slots() -> None:
    legend: dict[str, LegendEntry] = {
        "T": "token_shift",
        "X": {"mixer": "sliding", "window": 128, "xsa": True},
        "B": {"mixer": ["token_shift", "full"], "xsa": True},
    }
    assert read_slots("T X*2 B", legend, KINDS, OPTIONS) == [
        Slot(("token_shift",)),
        *[Slot(("sliding",), options={"window": 128, "xsa": True})] * 2,
        Slot(("token_shift", "full"), options={"xsa": True}),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mixer": "full", "window": 8}, r"full takes \"mixer\" and \['xsa'\]"),
        (
            {"mixer": ["full", "sliding"], "back": 1},
            r"full and sliding takes \"mixer\" and \['window', 'xsa'\]",
        ),
        ({"mixer": "token_shift", "back": 1}, r'token_shift takes "mixer" and no other'),
        ({"window": 8}, r"has the options \['window'\] and no \"mixer\"; name one"),
        ({"mixer": []}, "must name each mixer once"),
        ({"mixer": "tica"}, 'no mixer "tica"; choose from'),
    ],
)
def test_options_that_are_refused(entry: LegendEntry, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_slots("A", {"A": entry}, ("full", "sliding", "token_shift"), OPTIONS)


def test_a_conversion_takes_a_window_and_neither_other_options_nor_a_token_shift() -> None:
    (slot,) = parse_pattern("S", {"S": {"mixer": "sliding", "window": 8}}, 1)
    assert slot.window == 8 and not slot.converted
    assert slot.as_dict() == {"mixers": ["sliding"], "donors": {}, "window": 8}
    assert Slot.from_dict(slot.as_dict()) == slot
    assert "window" not in Slot(("sliding",)).as_dict()
    with pytest.raises(ValueError, match=r"takes \"mixer\" and \['window'\]"):
        parse_pattern("S", {"S": {"mixer": "sliding", "xsa": True}}, 1)
    with pytest.raises(ValueError, match='takes "mixer" and no other'):
        parse_pattern("F", {"F": {"mixer": "full", "window": 8}}, 1)
    with pytest.raises(ValueError, match='no mixer "token_shift"'):
        parse_pattern("T", {"T": "token_shift"}, 1)


@given(st.text("ABab*0123 ", max_size=8))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_any_text_is_read_or_refused(pattern: str) -> None:
    legend: dict[str, LegendEntry] = dict.fromkeys("ABab", "full")
    if re.fullmatch(r"\s*([ABab]+\s*(\*\s*[0-3]+\s*)?)+", pattern):
        assert all(slot == Slot(("full",)) for slot in read_slots(pattern, legend, KINDS, {}))
    else:
        with pytest.raises(ValueError, match="cannot read"):
            read_slots(pattern, legend, KINDS, {})


def test_a_slip_of_the_finger_does_not_fill_the_memory() -> None:
    assert len(read_slots("S*4096", LEGEND, KINDS, {})) == 4096
    with pytest.raises(ValueError, match="has 99999999999 slots; at most 4096"):
        read_slots("S*99999999999", LEGEND, KINDS, {})
