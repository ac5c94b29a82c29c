"""Speeds are tokens by the clock, and bytes are those of the states."""

import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest

from small_student import make_student
from trihybrid.infer.engine import Engine
from trihybrid.infer.speed import SpeedRow, measure_speed
from trihybrid.report.speed import speed_figures, speed_page


def test_rows_are_counts_by_the_clock() -> None:
    """A clock that moves on by a second at every look: a step of any kind takes one."""
    ticks = itertools.count()
    rows = measure_speed("small", make_student(), [7, 20], [1, 3], chunk=8, clock=lambda: float(next(ticks)))
    assert [(row.context, row.batch) for row in rows] == [(7, 1), (7, 3), (20, 1), (20, 3)]
    # Between two looks at the clock lies one second, however many steps a prompt takes.
    assert [row.prefill for row in rows] == [7, 7, 20, 20]
    assert [(row.decode, row.step_ms) for row in rows] == [(1, 1000), (3, 1000)] * 2
    engine = Engine(make_student())
    assert [row.state_bytes for row in rows] == [row.batch * engine.bytes_of(row.context) for row in rows]
    assert {row.weight_bytes for row in rows} == {engine.memory()["weights"]}


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch is \[1, 0\]; give numbers of at least 1"):
        measure_speed("small", make_student(), [8], [1, 0])


def test_the_page_holds_every_row_and_figure() -> None:
    rows = [
        SpeedRow(name, context, batch, 1000.0, 50.0, 20.0, 2**20, 2**21)
        for name in ("teacher", "student")
        for context in (64, 4096)
        for batch in (1, 8)
    ]
    figures = speed_figures(rows)
    assert list(figures) == ["prefill", "decode", "state"]
    assert all(png.startswith(b"\x89PNG") for png in figures.values())
    page = speed_page("Speed of student", rows, "cpu")
    assert page.count("<img") == 3 and page.count("4,096") == 4


def test_bench_stands_a_teacher_beside_a_student(micro: ModuleType, micro_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "speed"
    command = (
        "bench",
        micro_run / "matched",
        "--teacher",
        micro_run / "teacher",
        "--context",
        9,
        "--batch",
        1,
    )
    result = micro.trihybrid(*command, "--out", out, "--json")
    assert (result.code, result.stderr) == (0, "")
    rows = json.loads(result.stdout)
    assert [(row["model"], row["context"], row["batch"]) for row in rows] == [
        ("matched", 9, 1), ("teacher", 9, 1),
    ]  # fmt: skip
    assert json.loads((out / "speed.json").read_text()) == rows
    assert sorted(path.name for path in out.iterdir()) == [
        "decode.png", "prefill.png", "speed.html", "speed.json", "state.png",
    ]  # fmt: skip
