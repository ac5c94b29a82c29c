"""Calibration: is a model right as often as it says that it is?

Tokens are put into bins of equal width by the probability of the first choice. The expected calibration error is

    sum over bins of  (tokens in the bin / all tokens) * |fraction that is right - mean probability|

(Guo et al., 2017, "On Calibration of Modern Neural Networks", equation 3). The entropy tells a student that became too
sure, or too unsure, from one that is only wrong.
"""

from dataclasses import dataclass

import torch

from trihybrid.evaluate.scoring import Scores

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Means over the tokens that count: entropy of the predictions in nats a token, and the calibration error in
    [0, 1]."""

    entropy: float
    error: float


class CalibrationMeter:
    """Sums, in float64, entropy, confidence and right first choices by bin of confidence."""

    def __init__(self) -> None:
        self.entropy = 0.0
        self.confidence_B = torch.zeros(BINS, dtype=torch.float64)
        self.right_B = torch.zeros(BINS, dtype=torch.float64)
        self.tokens = 0

    def add(self, scores: Scores) -> None:
        """Add one chunk."""
        confidence_N = scores.confidence_N.double().cpu()
        bin_N = (confidence_N * BINS).long().clamp(max=BINS - 1)
        self.confidence_B += torch.bincount(bin_N, confidence_N, BINS)
        self.right_B += torch.bincount(bin_N, scores.right_N.double().cpu(), BINS)
        self.entropy += scores.entropy_N.double().sum().item()
        self.tokens += len(confidence_N)

    def result(self) -> Calibration:
        """Return the means over everything added (at least one chunk)."""
        gap = (self.right_B - self.confidence_B).abs().sum().item()
        return Calibration(self.entropy / self.tokens, gap / self.tokens)
