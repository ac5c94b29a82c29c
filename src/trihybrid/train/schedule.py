"""The learning rate and Muon's momentum as pure functions of the step, and of the time where time is what ends.

      1 |    ________________
        |   /                \\
        |  /                  \\___  final_fraction (cosine or linear in between)
        | /
        +-------------------------> step
         warmup_steps    decay_steps (the last ones)
"""

import math

from trihybrid.train.section import MuonSection, ScheduleSection


def factor(step: int, section: ScheduleSection, steps: int) -> float:
    """What the peak learning rate is multiplied with at a step, in [0, 1].

    With w warm-up steps, d decay steps (`decay_steps`, or `decay_fraction` of all, or else steps - w) and final
    fraction f:

        step < w             (step + 1) / w, so that the first step learns and step w - 1 is at the peak
        step <= steps - d    1
        else                 p = (step - (steps - d)) / d, and
                             linear: 1 - (1 - f) p          cosine: f + (1 - f) (1 + cos(pi p)) / 2

    so that `final_fraction` belongs to step = steps, just past the end, and with f = 0 no step is wasted
    (the warmdown of the nanoGPT speedruns; the cosine is that of SGDR, arXiv 1608.03983, equation 5).

    Args:
        step: from 0 to steps.
        section: the schedule.
        steps: length of the stage.

    Raises:
        ValueError: the step is outside [0, steps], or warm-up and decay are longer than the stage.
    """
    if not 0 <= step <= steps:
        raise ValueError(f"step: {step} is outside 0..{steps}; give a step of this stage")
    warmup, decay = section.warmup_steps, section.decay_length(steps)
    if decay < 0 or warmup + decay > steps:
        raise ValueError(
            f"schedule: warmup_steps {warmup} and decay_steps {section.decay_steps} do not fit into {steps} "
            "steps; "
            "shorten them, or train longer"
        )
    if step < warmup:
        return (step + 1) / warmup
    start = steps - decay
    if section.kind == "constant" or step <= start:
        return 1.0
    return _decayed((step - start) / decay, section)


def time_factor(elapsed: float, seconds: float, seconds_a_step: float, section: ScheduleSection) -> float:
    """What the peak learning rate is multiplied with where a budget of time ends the stage, in [0, 1]; the warm-up is
    not in it.

    With r = seconds - elapsed and a decay of D seconds, p = max(0, 1 - r / D) goes into the curves of `factor`; linear
    to zero is min(1, r / D). D is decay_steps * seconds_a_step, or decay_fraction * seconds, or, where neither is
    given, all of the budget but the warm-up: seconds - warmup_steps * seconds_a_step.

    Args:
        elapsed: seconds trained so far; past the budget counts as its end.
        seconds: the budget, positive.
        seconds_a_step: what a step takes; 0.0 while nobody knows, and then a decay counted in steps has no length.
        section: the schedule.
    """
    if section.decay_steps is not None:
        length = section.decay_steps * seconds_a_step
    elif section.decay_fraction is not None:
        length = section.decay_fraction * seconds
    else:
        length = seconds - section.warmup_steps * seconds_a_step
    remaining = max(0.0, seconds - elapsed)
    if section.kind == "constant" or remaining >= length:
        return 1.0
    return _decayed(1.0 - remaining / length, section)


def momentum(step: int, section: MuonSection) -> float:
    """Muon's momentum at a step (from 0): linear from `momentum_start` at step 0 to `momentum` at step
    `momentum_warmup_steps`, and `momentum` from there on.
    """
    if section.momentum_start is None or step >= section.momentum_warmup_steps:
        return section.momentum
    share = step / section.momentum_warmup_steps
    return (1.0 - share) * section.momentum_start + share * section.momentum


def _decayed(progress: float, section: ScheduleSection) -> float:
    """The factor at a progress in [0, 1] through the decay."""
    if section.kind == "linear":
        return 1.0 - (1.0 - section.final_fraction) * progress
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.final_fraction + (1.0 - section.final_fraction) * cosine
