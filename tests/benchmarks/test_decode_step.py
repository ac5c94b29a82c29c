"""The benchmark of a decoding step, rehearsed in small on a CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("decode_step")


@pytest.mark.long
def test_every_execution_is_the_float32_step(run, tmp_path: Path) -> None:
    result = run("decode_step", "--tiny", "--json", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "decode_step.json").read_text())
    assert [(row["execution"], row["batch"]) for row in rows] == [
        (name, batch) for batch in (1, 4) for name in ("graph", "kernels")
    ]
    assert max(max(row["logits"]) for row in rows) <= 1e-5
    assert max(row["states"] for row in rows) <= 1e-5


def test_neighbours_are_halves_and_doubles_that_the_kernels_take(benchmark: ModuleType) -> None:
    found = list(benchmark.neighbours(benchmark.sizes.Sizes(16, 16, step=32), benchmark.sizes.FEWEST))
    assert [(own.block, own.warps, own.step, own.programs) for own in found] == [
        (32, 16, 32, 0), (16, 8, 32, 0), (16, 16, 16, 0), (16, 16, 64, 0),
    ]  # fmt: skip


def test_sequences_have_pages_of_their_own(benchmark: ModuleType) -> None:
    pages = benchmark.own_pages(130, 3)
    assert sorted(page for own in pages for page in own) == list(range(1, 10))
    assert all(len(own) == 130 // benchmark.PAGE + 1 for own in pages)


def test_a_search_ends_with_the_fastest_and_leaves_the_tables(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step whose time is known: 8 outputs, 2 warps and 1,024 inputs of a narrow product are best."""
    table = benchmark.sizes.PRODUCT
    before = {name: dict(getattr(benchmark.sizes, name)) for name in ("PRODUCT", "NORMED")}

    def time(graph: object) -> float:
        own = table["narrow"]
        return 1 + abs(own.block - 8) + abs(own.warps - 2) + abs(own.step - 1024) / 64

    monkeypatch.setattr(benchmark, "replay_ms", time)
    monkeypatch.setattr(benchmark, "triton_errors", lambda: ())
    monkeypatch.setattr(benchmark, "GraphDecoder", lambda network, step: StandIn())
    rows = list(benchmark.size_rows(None, None, 1))
    best = min(rows, key=lambda row: row["replay_ms"])
    assert (best["block"], best["warps"], best["step"], best["replay_ms"]) == (8, 2, 1024, 1.0)
    assert {name: getattr(benchmark.sizes, name) for name in before} == before


class StandIn:
    """A decoder that does nothing."""

    last_graph = None

    def __call__(self, *arguments: object) -> None:
        pass
