"""Is a mean lower than a baseline's? Student's and Welch's t-test, one-sided, without a statistics library."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """A mean held against a baseline.

    Attributes:
        difference: mean of the values minus mean of the baseline; below zero is better.
        t: the test's statistic.
        degrees: degrees of freedom, at least 1 (Welch-Satterthwaite, so rarely whole).
        p: probability of a t that small or smaller if both had the same mean, in 0..1.
    """

    difference: float
    t: float
    degrees: float
    p: float


def compare_means(values: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """One-sided test of "the values' mean is below the baseline's".

    Args:
        values: at least two, not all equal.
        baseline: one number, taken as exact (Student's t-test of one sample), or several repetitions (Welch's t-test,
            Biometrika 34, 1947).

    Raises:
        ValueError: too few values, no baseline, or no spread at all, which makes every difference look certain.
    """
    if len(values) < 2 or not baseline:
        raise ValueError(
            f"p-value: {len(values)} values against {len(baseline)}; needs at least two against at least one"
        )
    difference = statistics.fmean(values) - statistics.fmean(baseline)
    own = statistics.variance(values) / len(values)
    other = statistics.variance(baseline) / len(baseline) if len(baseline) > 1 else 0.0
    if own + other == 0.0:
        raise ValueError("p-value: all values are equal, so that their spread is unknown; give other seeds")
    degrees = (own + other) ** 2 / (
        own**2 / (len(values) - 1) + (other**2 / (len(baseline) - 1) if len(baseline) > 1 else 0.0)
    )
    t = difference / math.sqrt(own + other)
    return Comparison(difference, t, degrees, student_below(t, degrees))


def student_below(t: float, degrees: float) -> float:
    """P(T <= t) of Student's distribution with `degrees` > 0 degrees of freedom.

    With t = sqrt(degrees) tan(angle) the density is proportional to cos(angle)^(degrees - 1), which Simpson's rule
    takes over a bounded range; about 1e-9 absolute for one degree or more.
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    intervals = 2000
    step = angle / intervals
    weights = (1 if i in (0, intervals) else 4 if i % 2 else 2 for i in range(intervals + 1))
    total = math.fsum(weight * math.cos(i * step) ** (degrees - 1) for i, weight in enumerate(weights))
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    inside = min(0.5, constant * total * step / 3)
    return 0.5 - inside if t < 0 else 0.5 + inside
