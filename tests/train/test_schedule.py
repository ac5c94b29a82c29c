"""The schedule as numbers and borders."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.train import ScheduleSection, factor


def factors(steps: int, **fields: object) -> list[float]:
    section = ScheduleSection.model_validate(fields)
    return [factor(step, section, steps) for step in range(steps + 1)]


def test_warmup_reaches_the_peak_at_its_last_step() -> None:
    assert factors(6, kind="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_linear_warmdown() -> None:
    found = factors(8, kind="linear", decay_steps=4, final_fraction=0.0)
    assert found == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_linear_to_a_floor_after_warmup_by_default() -> None:
    found = factors(6, kind="linear", warmup_steps=2, final_fraction=0.2)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2], abs=1e-15)


def test_cosine_is_half_way_in_the_middle() -> None:
    found = factors(4, kind="cosine", final_fraction=0.1)
    root = math.sqrt(0.5)
    wanted = [1.0, 0.1 + 0.45 * (1 + root), 0.55, 0.1 + 0.45 * (1 - root), 0.1]
    assert found == pytest.approx(wanted, abs=1e-15)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    kind=st.sampled_from(["constant", "cosine", "linear"]),
    warmup=st.integers(0, 20),
    plateau=st.integers(0, 20),
    decay=st.integers(1, 20),
    final=st.floats(0.0, 1.0),
)
def test_rises_stays_falls_within_zero_and_one(
    kind: str, warmup: int, plateau: int, decay: int, final: float
) -> None:
    steps = warmup + plateau + decay
    fields = {"kind": kind, "warmup_steps": warmup, "final_fraction": final}
    found = factors(steps, **fields) if kind == "constant" else factors(steps, **fields, decay_steps=decay)
    assert all(0.0 <= value <= 1.0 for value in found)
    assert found[0] > 0.0
    assert found[:warmup] == sorted(found[:warmup])
    assert set(found[warmup : warmup + plateau + 1]) == {1.0}
    after = found[warmup + plateau :]
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(after))
    assert found[-1] == (1.0 if kind == "constant" else pytest.approx(final, abs=1e-15))


def test_borders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step: 5 is outside 0..4"):
        factor(5, ScheduleSection(), 4)
    with pytest.raises(ValueError, match="warmup_steps 3 and decay_steps 2 do not fit into 4 steps"):
        factor(0, ScheduleSection(warmup_steps=3, decay_steps=2), 4)
    with pytest.raises(ValueError, match="warmup_steps 5 and decay_steps None do not fit"):
        factor(0, ScheduleSection(warmup_steps=5), 4)
