import logging
from collections.abc import Iterator

import pytest
import torch

from trihybrid.ops import backend as registry
from trihybrid.ops.backend import Backend, backends, choose, choose_for, register

CPU = torch.device("cpu")


def anywhere(device: torch.device) -> str | None:
    return None


def nowhere(device: torch.device) -> str | None:
    return f"no compiler for {device.type}"


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An operator with a slow, a fast and an unavailable backend, in a registry of its own."""
    monkeypatch.setattr(registry, "_registry", {})
    registry._choose.cache_clear()
    register(Backend("add", "slow", torch.add, anywhere, priority=0))
    register(Backend("add", "fast", torch.add, anywhere, priority=5))
    register(Backend("add", "fused", torch.add, nowhere, priority=9))
    yield "add"
    registry._choose.cache_clear()


def test_the_available_backend_of_the_highest_priority_is_chosen(operator: str) -> None:
    assert choose(operator, None, CPU).name == "fast"
    assert choose(operator, "slow", CPU).name == "slow"
    assert [backend.name for backend in backends(operator)] == ["fused", "fast", "slow"]


def test_a_choice_is_logged_once(operator: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trihybrid.ops.backend"):
        for _ in range(3):
            choose(operator, None, CPU)
    assert [record.getMessage() for record in caplog.records] == ["operator add on cpu: backend fast"]


def test_a_backend_registered_later_is_seen(operator: str) -> None:
    assert choose(operator, None, CPU).name == "fast"
    register(Backend("add", "faster", torch.add, anywhere, priority=7))
    assert choose(operator, None, CPU).name == "faster"


def test_a_foreign_backend_is_taken_by_name_alone(operator: str) -> None:
    """Neither as the best one, nor where the best one does not take a call, nor where there is no other."""
    register(Backend("add", "theirs", torch.add, anywhere, priority=8, foreign=True))
    register(Backend("add", "narrow", torch.add, anywhere, priority=9, takes=narrow))
    assert choose(operator, "theirs", CPU).name == "theirs"
    assert choose(operator, None, CPU).name == "narrow"
    assert choose_for(operator, None, CPU, 65).name == "fast"
    register(Backend("multiply", "theirs", torch.mul, anywhere, priority=0, foreign=True))
    with pytest.raises(ValueError, match="'multiply' has no backend available on cpu"):
        choose("multiply", None, CPU)


def test_an_unavailable_backend_is_an_error_with_its_reason(operator: str) -> None:
    with pytest.raises(ValueError, match=r"'fused'.*'add'.*no compiler for cpu.*\['fast', 'slow'\]"):
        choose(operator, "fused", CPU)


def test_unknown_names_are_errors(operator: str) -> None:
    with pytest.raises(ValueError, match=r"'add' has no backend 'magic'.*\['fast', 'slow'\]"):
        choose(operator, "magic", CPU)
    with pytest.raises(ValueError, match=r"'subtract' has no backend.*\['add'\]"):
        choose("subtract", None, CPU)


def test_no_available_backend_is_an_error(operator: str) -> None:
    register(Backend("multiply", "fused", torch.mul, nowhere, priority=0))
    with pytest.raises(ValueError, match=r"no backend available on cpu.*no compiler for cpu"):
        choose("multiply", None, CPU)


def test_a_name_is_registered_once(operator: str) -> None:
    with pytest.raises(ValueError, match="'slow' of operator 'add' is registered already"):
        register(Backend("add", "slow", torch.add, anywhere, priority=1))


def narrow(width: int) -> str | None:
    return None if width <= 64 else f"width is {width}, 64 at most"


def test_a_call_that_does_not_fit_goes_to_the_next_backend_with_one_log_line(
    operator: str, caplog: pytest.LogCaptureFixture
) -> None:
    register(Backend("add", "tight", torch.add, anywhere, priority=7, takes=narrow))
    with caplog.at_level(logging.INFO, logger="trihybrid.ops.backend"):
        assert choose_for(operator, None, CPU, 64).name == "tight"
        assert [choose_for(operator, None, CPU, 65).name for _ in range(3)] == ["fast"] * 3
    messages = [record.getMessage() for record in caplog.records]
    assert messages[1:] == ["operator add on cpu: backend fast, because tight: width is 65, 64 at most"]


def test_a_call_that_does_not_fit_the_backend_asked_for_is_an_error(operator: str) -> None:
    register(Backend("add", "tight", torch.add, anywhere, priority=7, takes=narrow))
    with pytest.raises(ValueError, match="backend 'tight' of operator 'add' cannot do this: width is 65"):
        choose_for(operator, "tight", CPU, 65)


def test_a_call_that_fits_no_backend_is_an_error(operator: str) -> None:
    register(Backend("divide", "tight", torch.div, anywhere, priority=7, takes=narrow))
    with pytest.raises(ValueError, match="'divide' has no backend on cpu but 'tight': width is 65"):
        choose_for("divide", None, CPU, 65)
