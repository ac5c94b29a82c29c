"""The clock of a stage: how far it is, in steps or in seconds, and whether there is time for another step.

Without a budget of seconds everything here follows from the step. With one, a run depends on the speed of its
machine, and repeating or resuming it gives the same to the bit only by chance.
"""

import statistics
from collections import deque
from dataclasses import dataclass
from time import perf_counter

from trihybrid.train.distributed import ALONE, Workers
from trihybrid.train.schedule import factor, time_factor
from trihybrid.train.section import LoopSection, ScheduleSection

_REMEMBERED = 64  # steps whose median is what a step takes


@dataclass(frozen=True)
class Moment:
    """A stage between two steps.

    Attributes:
        step: steps done; the next step has this number.
        fraction: of the run that is done, in [0, 1]: of its steps, or of its seconds if that is more.
        expected_steps: steps of the whole stage, estimated where seconds decide, `step` once it is over.
        factor: what the peak learning rates are multiplied with in the next step, in [0, 1].
        over: the stage is done.
    """

    step: int
    fraction: float
    expected_steps: int
    factor: float
    over: bool


class Clock:
    """Counts the time of a stage from its making on.

    Args:
        loop: the stage's steps and seconds.
        schedule: its learning rate.
        step: steps done already.
        seconds: training time already spent.
        workers: all take the first one's time, so that they decide the same.
        behind: steps that have been asked for and are not done when the clock is looked at (1 on a GPU).
    """

    def __init__(
        self,
        loop: LoopSection,
        schedule: ScheduleSection,
        step: int = 0,
        seconds: float = 0.0,
        workers: Workers = ALONE,
        behind: int = 0,
    ) -> None:
        self._behind = behind
        self._loop, self._schedule, self._workers = loop, schedule, workers
        self._origin = perf_counter() - seconds
        self._average = seconds / step if step else 0.0
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._last: float | None = None
        self._first_step = step

    def elapsed(self) -> float:
        """Training time in seconds, that of earlier sessions included, on this worker."""
        return perf_counter() - self._origin

    def moment(self, step: int) -> Moment:
        """Look at the clock before a step; each step once, in order."""
        loop = self._loop
        by_step = factor(step, self._schedule, loop.steps)
        if loop.seconds is None:
            return Moment(step, step / loop.steps, loop.steps, by_step, step == loop.steps)
        elapsed = self._workers.first_value(self.elapsed())
        # The first step of a session compiles and allocates: it says nothing about the others.
        if self._last is not None and step > self._first_step + 1:
            self._durations.append(elapsed - self._last)
        self._last = elapsed
        pace = statistics.median(self._durations) if self._durations else self._average
        elapsed += self._behind * pace
        remaining = loop.seconds - elapsed
        over = step == loop.steps or (step > 0 and remaining < max(pace, 1e-9))
        more = int(max(0.0, remaining) / pace) if pace > 0.0 else loop.steps
        return Moment(
            step=step,
            fraction=min(1.0, max(step / loop.steps, elapsed / loop.seconds)),
            expected_steps=step if over else max(step + 1, min(loop.steps, step + more)),
            factor=min(by_step, time_factor(elapsed, loop.seconds, pace, self._schedule)),
            over=over,
        )
