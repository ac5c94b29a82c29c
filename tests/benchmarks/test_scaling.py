"""The cost model gives back the points that it was made of, and hours that are tokens over rates."""

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def scaling(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("scaling")


def test_points_of_the_formula_are_fitted_exactly(scaling: ModuleType) -> None:
    true = scaling.Model(alone=20_000.0, tokens=16_384, trained=148_000_000, seconds_a_byte=1e-10)
    # Two GPUs send 4 P bytes each: 0.592 GB, 59.2 ms beside 819.2 ms of computation.
    assert true.rate(2) == pytest.approx(2 * 16_384 / (0.8192 + 0.0592), rel=1e-12)
    fitted = scaling.fit({n: true.rate(n) for n in (1, 2, 4)}, 16_384, 148_000_000)
    assert fitted.seconds_a_byte == pytest.approx(1e-10, rel=1e-9)
    assert fitted.rate(8) == pytest.approx(true.rate(8), rel=1e-9)
    assert fitted.gpu_hours(8, 1e9) == pytest.approx(8e9 / true.rate(8) / 3600, rel=1e-9)


def test_weights_that_are_shared_out_are_gathered_instead_of_gradients(scaling: ModuleType) -> None:
    model = scaling.Model(20_000.0, 16_384, trained=100, seconds_a_byte=1e-10, gathered=1_000)
    assert model.bytes_sent(4) == 0.75 * (1_000 + 400)
    assert scaling.Model(20_000.0, 16_384, trained=100, seconds_a_byte=1e-10).bytes_sent(4) == 0.75 * 800
    assert scaling.fit({n: model.rate(n) for n in (1, 2)}, 16_384, 100, 1_000).rate(8) == pytest.approx(
        model.rate(8), rel=1e-9
    )


def test_without_waiting_the_rates_add_up(scaling: ModuleType) -> None:
    for points in ({1: 10.0}, {1: 10.0, 2: 20.0}, {1: 10.0, 2: 21.0}):
        model = scaling.fit(points, 100, 1000)
        assert model.rate(8) == pytest.approx(80.0) and model.bytes_sent(1) == 0


@pytest.mark.parametrize("points", [{2: 10.0}, {1: 0.0}, {}, {0: 1.0, 1: 1.0}])
def test_points_that_say_nothing_are_refused(scaling: ModuleType, points: dict) -> None:
    with pytest.raises(ValueError, match="give one point of 1 GPU"):
        scaling.fit(points, 100, 1000)
