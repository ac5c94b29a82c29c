"""Sampling follows the probabilities that its settings leave, and its seed and place alone."""

import pytest
import torch
from torch import Tensor

from trihybrid.infer.sampling import GREEDY, Sampling, choose

PROBABILITIES = [0.05, 0.4, 0.25, 0.2, 0.1]
DRAWS = 1000


def logits() -> Tensor:
    return torch.tensor(PROBABILITIES).log() + 3.0


def frequencies(sampling: Sampling, logits_V: Tensor | None = None) -> list[float]:
    """Of each token over places 1 to DRAWS of one sequence."""
    chosen = [
        choose(logits() if logits_V is None else logits_V, sampling, [0] * place)
        for place in range(1, DRAWS + 1)
    ]
    return [chosen.count(token) / DRAWS for token in range(len(PROBABILITIES))]


def check(found: list[float], weights: list[float]) -> None:
    """Three standard deviations of a frequency, and nothing of what is left out."""
    for share, weight in zip(found, weights, strict=True):
        probability = weight / sum(weights)
        assert abs(share - probability) <= 3 * (probability * (1 - probability) / DRAWS) ** 0.5


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [0.05, 0.4, 0.25, 0.2, 0.1]),
        ({"temperature": 0.5}, [0.05**2, 0.4**2, 0.25**2, 0.2**2, 0.1**2]),
        ({"top_k": 2}, [0, 0.4, 0.25, 0, 0]),
        ({"top_k": 99}, [0.05, 0.4, 0.25, 0.2, 0.1]),
        ({"top_p": 0.6}, [0, 0.4, 0.25, 0, 0]),
        ({"top_p": 0.66}, [0, 0.4, 0.25, 0.2, 0]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"min_p": 0.3}, [0, 0.4, 0.25, 0.2, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        # Of the three likeliest, two reach 0.7 of their 0.85.
        ({"top_k": 3, "top_p": 0.7}, [0, 0.4, 0.25, 0, 0]),
        ({"top_k": 4, "min_p": 0.55}, [0, 0.4, 0.25, 0, 0]),
    ],
)
def test_frequencies_are_the_probabilities_that_are_left(settings: dict, weights: list[float]) -> None:
    check(frequencies(Sampling(**({"temperature": 1.0, "seed": 3} | settings))), weights)


def test_a_penalty_divides_what_is_positive_and_multiplies_what_is_negative() -> None:
    logits_V = torch.tensor([1.0, 2.0, -0.5, -1.0, 0.0])
    penalised = [0.5, 2.0, -1.0, -1.0, 0.0]
    sampling = Sampling(temperature=1.0, repetition_penalty=2.0)
    chosen = [choose(logits_V, sampling, [0, 2, 0] * place) for place in range(1, DRAWS + 1)]
    check(
        [chosen.count(token) / DRAWS for token in range(5)], [float(torch.tensor(z).exp()) for z in penalised]
    )
    assert choose(logits_V, Sampling(repetition_penalty=4.0), [1]) == 0
    assert torch.equal(logits_V, torch.tensor([1.0, 2.0, -0.5, -1.0, 0.0]))


def test_no_temperature_takes_the_likeliest() -> None:
    assert {choose(logits(), Sampling(seed=seed), [seed]) for seed in range(9)} == {1}
    assert GREEDY.greedy and not Sampling(repetition_penalty=1.1).greedy


def test_a_draw_depends_on_seed_and_place_alone() -> None:
    def draws(seed: int, first: int) -> list[int]:
        return [choose(logits(), Sampling(1.0, seed=seed), [first] * place) for place in range(1, 40)]

    assert draws(1, 0) == draws(1, 4)
    assert len({tuple(draws(seed, 0)) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1\.0; it must be 0 \(likeliest token\) or a finite number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must lie above 0 and be at most 1"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"min_p": 1.5}, r"min_p is 1\.5; it must lie in 0 \(all tokens\) to 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0; it must lie in 0\.01 to 100"),
        ({"repetition_penalty": 1e-300}, r"repetition_penalty is 1e-300; it must lie in 0\.01 to 100"),
        ({"seed": -1}, r"seed is -1; it must lie in 0 to 2\*\*63 - 1"),
    ],
)
def test_what_is_out_of_range_is_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-320])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float, top_k: int) -> None:
    logits_V = torch.tensor([3.0, 90.0, -4.0, 89.0])
    for seed in range(5):
        assert choose(logits_V, Sampling(temperature, top_k=top_k, seed=seed), [0]) == 1


def test_logits_that_are_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="the model's logits are NaN"):
        choose(torch.full((4,), torch.nan), Sampling(0.7), [0])
