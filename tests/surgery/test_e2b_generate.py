"""`benchmarks/e2b_generate.py` small: a cache carries what logits need, and one that does not is found out."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trihybrid.models.decoder import slot


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "e2b_generate.py"
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_cached_logits_are_the_uncached_ones(benchmark: ModuleType, tmp_path: Path) -> None:
    assert benchmark.main(["--tiny", "--contexts", "24", "--json", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "e2b_generate.json").read_text())
    assert [(row["model"], row["batch"]) for row in rows] == [
        (model, batch) for model in ("teacher", "student") for batch in (1, 4)
    ]
    for row in rows:
        assert row["error"] < 1e-5 < 0.1 < row["halved"]
        assert 2 < row["spread"] < 4 and row["kinds"] > 3


def test_a_state_that_is_not_carried_is_found_out(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slot, "write_state", lambda cache, index, state: None)
    assert benchmark.main(["--tiny", "--contexts", "24"]) == 1
    missed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missed")]
    assert [line.split(":")[1] for line in missed] == [
        f" student, context 24, batch {batch}" for batch in (1, 4)
    ]


def test_a_student_may_err_twice_as_much_as_its_teacher(benchmark: ModuleType) -> None:
    def rows(teacher: float, student: float) -> list:
        return [benchmark.Row("teacher", 512, 1, teacher), benchmark.Row("student", 512, 1, student)]

    assert not list(benchmark.misses(rows(0.04, 0.08), tiny=False))
    assert not list(benchmark.misses(rows(0.001, 0.02), tiny=False))
    assert list(benchmark.misses(rows(0.04, 0.081), tiny=False))
    assert list(benchmark.misses(rows(0.001, 0.021), tiny=False))
    assert list(benchmark.misses([benchmark.Row("teacher", 512, 1, float("inf"))], tiny=False))
    assert list(benchmark.misses([benchmark.Row("teacher", 512, 1, problem="left out")], tiny=False))
