"""The learning rate as a pure function of the step.

      1 |    ________________
        |   /                \\
        |  /                  \\___  final_fraction (cosine or linear in between)
        | /
        +-------------------------> step
         warmup_steps    decay_steps (the last ones)
"""

import math

from trihybrid.train.section import ScheduleSection


def factor(step: int, section: ScheduleSection, steps: int) -> float:
    """What the peak learning rate is multiplied with at a step, in [0, 1].

    With w warm-up steps, d decay steps (by default steps - w) and final fraction f:

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
    warmup = section.warmup_steps
    decay = steps - warmup if section.decay_steps is None else section.decay_steps
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
    progress = (step - start) / decay
    if section.kind == "linear":
        return 1.0 - (1.0 - section.final_fraction) * progress
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.final_fraction + (1.0 - section.final_fraction) * cosine
