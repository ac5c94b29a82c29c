"""A stage that ends by the clock, with a clock that the test winds."""

from pathlib import Path
from types import ModuleType

import pytest

import trihybrid.train.clock as clock_module
from trihybrid.train.clock import Clock, Moment
from trihybrid.train.section import LoopSection, ScheduleSection


class Time:
    """Replaces perf_counter."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(clock_module, "perf_counter", time)
    return time


def moments(time: Time, durations: list[float], clock: Clock, first: int = 0) -> list[Moment]:
    found = [clock.moment(first)]
    for number, duration in enumerate(durations, start=first + 1):
        time.now += duration
        found.append(clock.moment(number))
    return found


def test_without_seconds_the_step_is_all(time: Time) -> None:
    clock = Clock(LoopSection(steps=4), ScheduleSection(kind="linear", final_fraction=0.0))
    found = moments(time, [1.0, 50.0, 0.1, 2.0], clock)
    assert [moment.fraction for moment in found] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [moment.factor for moment in found] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [moment.over for moment in found] == [False] * 4 + [True]
    assert {moment.expected_steps for moment in found} == {4}
    assert clock.elapsed() == pytest.approx(53.1)


def test_no_step_begins_that_would_not_end_in_time(time: Time) -> None:
    """The first step compiles for 4 seconds, the others take 0.5: eleven more fit into 10 seconds."""
    section = ScheduleSection(kind="linear", decay_steps=4, final_fraction=0.0)
    clock = Clock(LoopSection(steps=1000, seconds=9.75), section)
    found = moments(time, [4.0] + [0.5] * 11, clock)
    assert [moment.over for moment in found] == [False] * 12 + [True]
    assert [moment.factor for moment in found[:9]] == [1.0] * 9
    # remaining 1.75, 1.25, 0.75 of the 2 seconds that four steps take
    assert [moment.factor for moment in found[9:12]] == pytest.approx([0.875, 0.625, 0.375])
    assert found[8].fraction == pytest.approx(7.5 / 9.75)
    assert [moment.expected_steps for moment in found[9:]] == [12, 12, 12, 12]


def test_a_first_step_longer_than_the_budget_is_the_only_one(time: Time) -> None:
    clock = Clock(LoopSection(steps=1000, seconds=3.0), ScheduleSection())
    found = moments(time, [4.0], clock)
    assert [(moment.over, moment.fraction) for moment in found] == [(False, 0.0), (True, 1.0)]


def test_a_resumed_clock_knows_what_was_spent(time: Time) -> None:
    loop = LoopSection(steps=1000, seconds=10.0)
    schedule = ScheduleSection(kind="linear", decay_steps=10, final_fraction=0.0)
    clock = Clock(loop, schedule, step=16, seconds=8.0)
    (moment,) = moments(time, [], clock, first=16)
    assert (moment.fraction, moment.expected_steps, moment.over) == (0.8, 20, False)
    assert moment.factor == pytest.approx(0.4)


def test_steps_end_a_stage_that_has_time_left(time: Time) -> None:
    schedule = ScheduleSection(kind="linear", final_fraction=0.0)
    found = moments(time, [1.0] * 4, Clock(LoopSection(steps=4, seconds=1000.0), schedule))
    assert [moment.over for moment in found] == [False] * 4 + [True]
    assert [moment.factor for moment in found] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_step_that_still_runs_is_counted(time: Time) -> None:
    schedule = ScheduleSection(kind="constant")
    durations = [1.0] * 8
    over = [
        [
            moment.over
            for moment in moments(
                time, durations, Clock(LoopSection(steps=99, seconds=8.5), schedule, behind=behind)
            )
        ].index(True)
        for behind in (0, 1)
    ]
    assert over == [8, 7]


def test_fit_ends_by_the_clock_and_is_finished(tiny: ModuleType, tmp_path: Path, time: Time) -> None:
    """One second a step: ten steps, and the same again from the checkpoint without any."""

    class Slow(tiny.TinyTask):  # type: ignore[name-defined]
        def loss(self, batch):
            time.now += 1.0
            return super().loss(batch)

    section = tiny.section_of(seconds=10.5)
    task, summary = tiny.run_fit(tmp_path, task=Slow(), section=section)
    assert (summary.steps, summary.seconds, summary.tokens) == (10, pytest.approx(10.0), 10 * 4 * 5)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000009", "step-000010"]
    again, repeated = tiny.run_fit(tmp_path, task=Slow(), section=section)
    assert repeated == summary
    assert time.now == pytest.approx(110.0)
    assert all((tensor == again.parameters()[name]).all() for name, tensor in task.parameters().items())
