"""What the benchmark of E2B's shape says of its targets."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def benchmark(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("inference_e2b")


def row(
    benchmark: ModuleType, what: str, value: float, extra: float = 0.5, model: str = "student"
) -> dict[str, Any]:
    """As a run notes it."""
    run = benchmark.Run(benchmark.TINY, 0.0, None)
    run.note(
        {
            "model": model,
            "what": what,
            "batch": 1,
            "context": 4096,
            "value": value,
            "unit": "u",
            "extra_GiB": extra,
        }
    )
    return run.rows[0]


def test_a_target_is_missed_where_no_execution_meets_it(benchmark: ModuleType) -> None:
    slow, fast = row(benchmark, "decode", 5.0), row(benchmark, "decode", 2.0)
    assert benchmark.missed_targets([slow]) == ["decode, batch 1, 4,096 tokens: 2.2 u"]
    assert benchmark.missed_targets([slow, fast]) == benchmark.missed_targets([fast, slow]) == []
    assert benchmark.missed_targets([row(benchmark, "decode", 9.0, model="teacher")]) == []


def test_a_prompt_that_takes_too_much_memory_misses_its_target(benchmark: ModuleType) -> None:
    assert benchmark.missed_targets([row(benchmark, "prefill", 90_000.0)]) == []
    for other in (row(benchmark, "prefill", 99_999.0, extra=5.0), row(benchmark, "prefill", 80_000.0)):
        assert benchmark.missed_targets([other]) == ["prefill, batch 1, 4,096 tokens: 85000.0 u in 4.0 GiB"]
