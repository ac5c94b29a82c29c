"""The doctor finds what is wrong, and only what is wrong."""

import dataclasses
import io
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from rich.console import Console

from trihybrid import doctor
from trihybrid.ops import backend as registry

LOG_W = 1


def broken(damage: Callable[..., tuple]) -> registry.Backend:
    """The reference with damaged arguments or results, as one more backend that nobody takes by default."""
    (reference,) = (backend for backend in registry.backends("wkv7") if backend.name == "reference")
    return dataclasses.replace(
        reference,
        name="broken",
        function=lambda *arguments: damage(reference.function, *arguments),
        available=lambda device: None,
        priority=-1,
    )


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[registry.Backend], None]]:
    """Register a backend beside the reference for the length of a test."""
    only_reference = {key: value for key, value in registry._registry.items() if key == ("wkv7", "reference")}
    monkeypatch.setattr(registry, "_registry", only_reference)
    monkeypatch.setattr(doctor, "CHECKED_DTYPES", {"cpu": (torch.float32,)})
    yield registry.register
    registry._choose.cache_clear()


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def text_of(examination: doctor.Examination) -> str:
    console = Console(file=io.StringIO(), width=200)
    doctor.render(examination, console)
    return console.file.getvalue()


def test_a_healthy_installation_passes() -> None:
    before = torch.random.get_rng_state()
    examination = doctor.examine()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert examination.healthy
    checked = {check.name for check in examination.checks}
    for backend in registry.backends("wkv7"):
        if backend.available(torch.device("cpu")) is None:
            assert f"wkv7 {backend.name}, cpu, float32" in checked
    assert {"divergence, cpu, float64", "attention, cpu, float32"} <= checked
    assert [(choice.operator, choice.device) for choice in examination.choices] == [("wkv7", "cpu")]
    assert examination.choices[0].backend == registry.choose("wkv7", None, torch.device("cpu")).name
    assert examination.versions["torch"] == torch.__version__
    text = text_of(examination)
    assert torch.__version__ in text
    assert text.rstrip().endswith("\nhealthy")
    assert "FAIL" not in text


def test_a_backend_is_not_blamed_for_a_dtype_that_it_does_not_take(
    register: Callable[[registry.Backend], None],
) -> None:
    def halves(key_width: int, value_width: int, dtype: torch.dtype) -> str | None:
        return None if dtype == torch.bfloat16 else f"v is {dtype}"

    (reference,) = registry.backends("wkv7")
    register(dataclasses.replace(reference, name="halves", takes=halves))
    examination = doctor.examine()
    assert examination.healthy
    assert not any("halves" in check.name for check in examination.checks)


def test_a_foreign_backend_is_not_examined(register: Callable[[registry.Backend], None]) -> None:
    register(dataclasses.replace(broken(late_error), foreign=True))
    examination = doctor.examine()
    assert examination.healthy
    assert not any("broken" in check.name for check in examination.checks)


def late_error(function: Callable, *arguments: object) -> tuple:
    """One number in 25,600 is off by one, in the last token."""
    o_BTHV, state_BHKV = function(*arguments)
    bump = torch.zeros_like(o_BTHV)
    bump[-1, -1, -1, -1] = 1
    return o_BTHV + bump, state_BHKV


def lost_gradient(function: Callable, *arguments: object) -> tuple:
    """Right in every output; no gradient reaches log_w past a thousandth."""
    log_w = arguments[LOG_W]
    return function(*arguments[:LOG_W], log_w * 0.999 + log_w.detach() * 0.001, *arguments[LOG_W + 1 :])


def unwritten(function: Callable, *arguments: object) -> tuple:
    """The final state holds a NaN."""
    o_BTHV, state_BHKV = function(*arguments)
    return o_BTHV, torch.where(torch.arange(state_BHKV.shape[-1]) == 3, math.nan, state_BHKV)


@pytest.mark.parametrize(
    ("damage", "worst"),
    [(late_error, "o, "), (lost_gradient, "gradient of log_w, "), (unwritten, "final state, ")],
)
def test_a_wrong_backend_is_found_and_named(register: Callable, damage: Callable, worst: str) -> None:
    register(broken(damage))
    examination = doctor.examine()
    assert not examination.healthy
    (failed,) = (check for check in examination.checks if not check.passed)
    assert failed.name == "wkv7 broken, cpu, float32"
    assert failed.detail.startswith(worst)
    assert "FAIL" in text_of(examination)
    assert "NOT healthy: 1 of" in text_of(examination)


def test_a_backend_that_raises_is_a_finding_and_the_exit_code_is_one(
    register: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_error(function: Callable, *arguments: object) -> tuple:
        raise RuntimeError("no kernel image\nfor this device")

    register(broken(raise_error))
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "RuntimeError" in printed
    assert "NOT healthy" in printed


def test_an_operator_without_a_backend_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [
        dataclasses.replace(backend, available=lambda device: "needs a device that is not here")
        for backend in registry.backends("wkv7")
    ]
    monkeypatch.setattr(
        registry, "_registry", {(backend.operator, backend.name): backend for backend in absent}
    )
    registry._choose.cache_clear()
    examination = doctor.examine()
    registry._choose.cache_clear()
    assert not examination.healthy
    assert examination.choices[0].backend is None
    assert "needs a device that is not here" in text_of(examination)


def test_the_error_is_relative_and_floored() -> None:
    reference = torch.full((4,), 2.0)
    assert doctor.relative_error(reference * 1.5, reference) == pytest.approx(0.5)
    assert doctor.relative_error(torch.full((4,), 1e-6), torch.zeros(4)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"shape \(3,\) differs"):
        doctor.relative_error(torch.zeros(3), reference)
    assert not doctor.Check("x", math.nan, 1e-5, "o").passed
