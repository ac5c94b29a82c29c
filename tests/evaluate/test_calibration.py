"""Entropy and calibration error, against their formulas."""

import pytest
import torch

from trihybrid.data import Batch
from trihybrid.evaluate.calibration import BINS, CalibrationMeter
from trihybrid.evaluate.scoring import Scores, score


def scores(confidence: list[float], right: list[bool]) -> Scores:
    confidence_N = torch.tensor(confidence)
    zero_N = torch.zeros(len(confidence))
    return Scores(zero_N, zero_N.long(), None, zero_N + 0.5, confidence_N, torch.tensor(right))


def test_the_error_is_the_weighted_gap_of_the_bins() -> None:
    meter = CalibrationMeter()
    meter.add(scores([0.95, 0.97, 1.0], [True, False, True]))
    meter.add(scores([0.21, 0.95], [True, False]))
    # One bin from 14/15 on: 4 tokens, 2 right, 3.87 expected; one of a single token.
    assert BINS == 15
    assert meter.result().error == pytest.approx((abs(2 - 3.87) + abs(1 - 0.21)) / 5, rel=1e-6)
    assert meter.result().entropy == pytest.approx(0.5)


def test_a_model_that_draws_from_its_own_distribution_is_calibrated(bigram) -> None:
    """Targets drawn from the model's own predictions: it is right as often as it says, up to the draw."""
    model = bigram(0)
    p_VV = torch.softmax(model.table.double(), dim=-1)
    generator = torch.Generator().manual_seed(1)
    first_N = torch.randint(len(p_VV), (4000,), generator=generator)
    second_N = torch.multinomial(p_VV[first_N], 1, generator=generator).squeeze(1)
    batch = Batch(torch.stack([first_N, second_N], 1), torch.tensor([[0, 1]]).expand(4000, -1))
    meter = CalibrationMeter()
    score(model, [batch], [meter])
    assert meter.tokens == 4000
    assert meter.result().error <= 0.03
    entropy_V = -(p_VV * p_VV.log()).sum(-1)
    assert meter.result().entropy == pytest.approx(entropy_V[first_N].mean().item(), rel=1e-6)
