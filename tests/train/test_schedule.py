"""The schedule as numbers and borders."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.train import MuonSection, ScheduleSection, factor
from trihybrid.train.schedule import momentum, time_factor


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


def test_a_fraction_of_the_steps_is_that_many_steps() -> None:
    by_fraction = factors(8, kind="linear", decay_fraction=0.5, final_fraction=0.0)
    assert by_fraction == factors(8, kind="linear", decay_steps=4, final_fraction=0.0)


def test_the_decay_by_time_as_numbers() -> None:
    """The stock baseline's min(1, remaining / (decay_steps * seconds a step))."""
    section = ScheduleSection(kind="linear", decay_steps=20, final_fraction=0.0)
    found = [time_factor(elapsed, 10.0, 0.25, section) for elapsed in (0.0, 5.0, 6.0, 7.5, 10.0, 11.0)]
    assert found == pytest.approx([1.0, 1.0, 0.8, 0.5, 0.0, 0.0])
    assert time_factor(9.0, 10.0, 0.0, section) == 1.0
    floor = ScheduleSection(kind="linear", decay_fraction=0.5, final_fraction=0.1)
    assert time_factor(7.5, 10.0, 0.0, floor) == pytest.approx(0.55)
    half = ScheduleSection(kind="cosine", warmup_steps=8, final_fraction=0.0)
    assert time_factor(6.0, 10.0, 0.25, half) == pytest.approx(0.5)
    assert time_factor(9.9, 10.0, 0.25, ScheduleSection(kind="constant")) == 1.0


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    kind=st.sampled_from(["cosine", "linear"]),
    steps=st.integers(10, 60),
    share=st.floats(0.1, 1.0),
    pace=st.floats(0.01, 10.0),
)
def test_time_that_runs_with_the_steps_gives_the_factor_of_the_steps(
    kind: str, steps: int, share: float, pace: float
) -> None:
    section = ScheduleSection.model_validate({"kind": kind, "decay_steps": max(1, int(share * steps))})
    for step in range(steps + 1):
        by_time = time_factor(step * pace, steps * pace, pace, section)
        assert by_time == pytest.approx(factor(step, section, steps), abs=1e-9)


def test_momentum_warms_up_linearly() -> None:
    section = MuonSection(momentum=0.95, momentum_start=0.85, momentum_warmup_steps=4)
    found = [momentum(step, section) for step in range(6)]
    assert found == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    assert momentum(0, MuonSection(momentum=0.9)) == 0.9
