"""The average is the formula, starts without a lag, survives a resume to the bit and ends in the parameters."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from trihybrid.train import Average, AverageSection, TrainSection


class Stop(BaseException):
    """Stands for an interruption from outside."""


def averaged(tiny: ModuleType, **fields: float) -> TrainSection:
    section = tiny.section_of()
    return section.model_copy(update={"average": AverageSection.model_validate(fields)})


@settings(deadline=None, max_examples=20, derandomize=True)
@given(decay=st.floats(0.0, 1.0), count=st.integers(1, 12))
def test_the_average_is_the_weighted_mean_without_the_initial_values(decay: float, count: int) -> None:
    parameter = nn.Parameter(torch.full((3,), 1e6, dtype=torch.float64))
    average = Average({"p": parameter}, AverageSection(decay=decay))
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    for value in values:
        with torch.no_grad():
            parameter.copy_(value)
        average.update(0.0, 100)
    weights = torch.tensor([decay ** (count - 1 - i) for i in range(count)], dtype=torch.float64)
    average.apply()
    wanted = (weights[:, None] * values).sum(0) / weights.sum()
    torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-10, atol=1e-12)


def test_a_horizon_is_a_fraction_of_the_steps() -> None:
    average = Average({"p": nn.Parameter(torch.zeros(1))}, AverageSection(horizon=0.1))
    assert average.decay(1000) == pytest.approx(0.99)
    assert average.decay(5) == 0.0


def test_nothing_is_averaged_before_the_start() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    average = Average({"p": parameter}, AverageSection(decay=1.0, start_fraction=0.5))
    for step in range(8):
        with torch.no_grad():
            parameter.fill_(float(step))
        average.update(step / 8, 8)
        assert average.started == (step >= 4)
    average.apply()
    assert parameter.item() == pytest.approx((4 + 5 + 6 + 7) / 4)


@pytest.mark.parametrize("fields", [{"decay": 0.9}, {"horizon": 0.3}, {"decay": 1.0, "start_fraction": 0.4}])
def test_resumed_average_is_the_uninterrupted_one_to_the_bit(
    tiny: ModuleType, tmp_path: Path, fields: dict[str, float]
) -> None:
    section = averaged(tiny, **fields)
    whole, summary = tiny.run_fit(tmp_path / "whole", section=section)
    plain, plain_summary = tiny.run_fit(tmp_path / "plain")

    def until(step: int):
        def batches(number: int) -> torch.Tensor:
            if number == step:
                raise Stop
            return tiny.batch_of(number)

        return batches

    for step in (8, 17):
        with pytest.raises(Stop):
            tiny.run_fit(tmp_path / "parts", batches=until(step), section=section)
    parts, _ = tiny.run_fit(tmp_path / "parts", section=section)
    again, repeated = tiny.run_fit(tmp_path / "parts", batches=until(0), section=section)
    last = load_file(tmp_path / "parts" / "checkpoints" / "step-000024" / "parameters.safetensors")
    assert (summary.averaged, repeated.averaged, plain_summary.averaged) == (True, True, False)
    assert summary.loss == plain_summary.loss
    for name, tensor in whole.parameters().items():
        assert torch.equal(tensor, parts.parameters()[name])
        assert torch.equal(tensor, again.parameters()[name])
        assert torch.equal(last[name], plain.parameters()[name])
        assert not torch.equal(tensor, last[name])


def test_an_average_that_never_began_leaves_the_last_parameters_and_says_so(
    tiny: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = tiny.TinyTask()
    section = averaged(tiny, decay=0.9, start_fraction=0.99)
    _, summary = tiny.run_fit(tmp_path, task=task, section=section)
    plain, _ = tiny.run_fit(tmp_path / "plain")
    assert not summary.averaged
    assert "ended before it began" in caplog.text
    assert all(torch.equal(tensor, plain.parameters()[name]) for name, tensor in task.parameters().items())


def test_a_state_that_does_not_belong_is_refused_and_changes_nothing() -> None:
    parameters = {"p": nn.Parameter(torch.ones(2)), "total": nn.Parameter(torch.ones(1))}
    average = Average(parameters, AverageSection(decay=0.5))
    assert average.state_tensors() == {}
    average.load_state_tensors({})
    average.update(0.0, 1)
    state = average.state_tensors()
    assert set(state) == {"average.p", "average.total", "total"}
    other = Average(parameters, AverageSection(decay=0.5))
    with pytest.raises(ValueError, match=r"lacks \['average.p'\], holds besides \['average.q'\]"):
        other.load_state_tensors({name.replace("e.p", "e.q"): tensor for name, tensor in state.items()})
    with pytest.raises(ValueError, match=r"'average.p': wanted torch.float32 \[2\], found .* \[3\]"):
        other.load_state_tensors({**state, "average.p": torch.zeros(3)})
    assert not other.started
