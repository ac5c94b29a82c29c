"""Norms, clipping and numbers on their way."""

import math

import pytest
import torch

from trihybrid.train.gradients import GradientNorms, Readback, check_finite, some_names


def pair() -> dict[str, torch.nn.Parameter]:
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in "abc"}
    parameters["a"].grad, parameters["b"].grad = torch.tensor([3.0]), torch.tensor([4.0])
    return parameters


def test_norms_are_those_of_the_gradients_that_are_there() -> None:
    norms = GradientNorms(pair())
    assert (norms.names, norms.each_P.tolist(), norms.total.item()) == (["a", "b"], [3.0, 4.0], 5.0)
    assert GradientNorms({"a": torch.nn.Parameter(torch.zeros(1))}).total.item() == 0.0


@pytest.mark.parametrize(("limit", "factor"), [(10.0, 1.0), (None, 1.0), (1.0, 0.2)])
def test_clipping_scales_to_the_limit_and_leaves_smaller_gradients_alone(
    limit: float | None, factor: float
) -> None:
    parameters = pair()
    GradientNorms(parameters).clip(limit)
    found = [parameters[name].grad.item() for name in "ab"]
    assert found == ([3.0, 4.0] if factor == 1.0 else pytest.approx([0.6, 0.8], rel=1e-5))


def test_the_total_is_torchs_own_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = {str(size): torch.nn.Parameter(torch.zeros(size)) for size in range(1, 40)}
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    wanted = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters.values()])
    assert torch.equal(GradientNorms(parameters).total, wanted)


def test_what_is_not_finite_is_named() -> None:
    norms = torch.tensor([1.0, math.nan, math.inf])
    check_finite(3, 1.0, 2.0, "abc", norms)
    with pytest.raises(FloatingPointError, match=r"step 3: loss 1.0, gradient norm nan; .*: b, c; lower"):
        check_finite(3, 1.0, math.nan, "abc", norms)
    with pytest.raises(FloatingPointError, match="loss inf"):
        check_finite(3, math.inf, 2.0, "a", norms[:1])


def test_many_names_are_counted() -> None:
    assert some_names([]) == "none"
    assert some_names("abcdefghij") == "a, b, c, d, e, f, g, h and 2 more"


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
        ),
    ],
)
def test_numbers_come_back_as_they_were(device: str) -> None:
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    readback = Readback({"a": tensor, "b": 0.1, "c": torch.tensor(0.5, device=device, requires_grad=True)})
    tensor.fill_(0.0)  # too late to be seen on a GPU
    first, second = readback.read(), readback.read()
    assert first.keys() == second.keys() == {"a", "b", "c"}
    assert first["b"].item() == 0.1
    assert first["c"].item() == 0.5
    assert first["a"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert all(number.dtype == torch.float64 and not number.is_cuda for number in first.values())
