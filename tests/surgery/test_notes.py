"""What a plan tells beside its numbers, of teachers that are no Gemma 4."""

import pytest

from tiny_teachers import WINDOW, teacher_config
from trihybrid.surgery.plan import make_plan
from trihybrid.surgery.section import SurgerySection

LEGEND = {
    "S": "sliding",
    "F": "full",
    "R": "rwkv7",
    "B": ["rwkv7", "tica"],
    "T": "tica",
    "W": {"mixer": "sliding", "window": WINDOW},
}
TURN, NARROW, WINDOWS = "turn with their position", "channels wide, and so are", "keep their weights and see"
RISE, NOTHING, SCORES = "context rise from", "nothing grows with context", "score FLOPs in converted slots"


def notes(name: str, pattern: str, **fields) -> list[str]:
    section = SurgerySection(pattern=pattern, legend=LEGEND, **fields)
    return make_plan(teacher_config(name), section, name, contexts=(64,))["warnings"]


@pytest.mark.parametrize(
    ("name", "pattern", "rwkv7", "found"),
    [
        ("llama", "RBFF", {"head_dim": 16}, {TURN}),
        ("llama", "RBFF", {"head_dim": 64}, {TURN, NARROW}),
        ("llama", "FFFF", {}, set()),
        ("llama", "WFWF", {}, {WINDOWS}),
        ("llama", "RWRW", {"head_dim": 8}, {TURN, WINDOWS, NOTHING}),
        ("gemma3", "SRSR", {"head_dim": 16}, {TURN, NOTHING}),
        ("mistral-windowed", "RRRS", {"head_dim": 16}, {TURN}),
    ],
)
def test_notes(name, pattern, rwkv7, found) -> None:
    told = notes(name, pattern, rwkv7=rwkv7, tica={"heads": 2, "kv_heads": 1, "head_dim": 24})
    assert len(told) == len(found)
    assert all(any(part in line for line in told) for part in found)


def test_windows_are_named() -> None:
    (line,) = notes("llama", "WFWF")
    assert line == f"layers [0, 2] keep their weights and see {WINDOW} tokens instead of all"


def test_growth_without_sharing_in_the_teacher_has_its_own_cause() -> None:
    told = [line for line in notes("mistral-windowed", "BBSS") if RISE in line]
    assert len(told) == 1
    # Two TICAs of two heads of 128, keys and values, two bytes each.
    assert "rise from 0 to 2,048 bytes a token: TICA stores more in its slots than the teacher did" in told[0]


def test_scores_are_compared_where_a_tica_stands_for_a_full_attention() -> None:
    """The tiny teacher's four heads of 16 against TICA's four of 16."""
    tica = {"heads": 4, "kv_heads": 2, "head_dim": 16}
    (line,) = [line for line in notes("qwen3", "TTFF", tica=tica) if SCORES in line]
    assert line == "a query-key pair costs 1/1 of the teacher's score FLOPs in converted slots"
    assert not [line for line in notes("qwen3-windowed", "FFBB", tica=tica) if SCORES in line]
    assert not [line for line in notes("qwen3", "TRFF", tica=tica) if SCORES in line]
