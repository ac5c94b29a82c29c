import logging
from collections.abc import Iterator

import pytest
import torch

from trihybrid.ops import backend as registry
from trihybrid.ops.backend import Backend, backends, choose, register

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
