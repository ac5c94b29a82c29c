"""benchmarks/distill_e2b.py in its tiny shape, and what it makes of its rows."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import distill_e2b
import distill_e2b_models
import results


@pytest.fixture(scope="module")
def rows() -> list[distill_e2b.Row]:
    return list(distill_e2b.measure(distill_e2b_models.tiny(), list(distill_e2b.PARTS), profile=False))


@pytest.mark.long
def test_all_parts_run_and_the_dense_form_has_the_same_loss(rows) -> None:
    assert not [row["failed"] for row in rows if "failed" in row]
    assert [(row["part"], row.get("kept")) for row in rows] == [
        ("align", None), ("long", 0), ("match", 0), ("match", 2), ("dense", None)
    ]  # fmt: skip
    losses = {(row["part"], row.get("kept")): row["loss"] for row in rows}
    assert losses["match", 0] == losses["match", 2] == pytest.approx(losses["dense", None], rel=1e-5)
    assert losses["match", 0] > 0.01


@pytest.mark.long
def test_tables_on_the_host_change_no_loss(rows) -> None:
    found = list(distill_e2b.measure(distill_e2b_models.tiny(), ["align", "match"], False, tables="host"))
    assert [row["failed"] for row in found if "failed" in row] == []
    wanted = {(row["part"], row.get("kept")): row["loss"] for row in rows if row.get("tables") == "device"}
    assert {(row["part"], row.get("kept")): row["loss"] for row in found} == {
        key: wanted[key] for key in (("align", None), ("match", 0), ("match", 2))
    }
    assert {row["tables"] for row in found} == {"host"}


@pytest.mark.long
def test_flops_of_a_step(rows) -> None:
    """More tokens cost more in proportion but for the scores, and the dense form counts as ours does."""
    found = {row["part"]: row["flops"] / row["length"] for row in rows}
    assert found["match"] == found["dense"] < found["long"] < 1.3 * found["match"]
    assert found["align"] < found["match"]


def test_targets_name_what_is_missed() -> None:
    good = [
        {"part": "align", "length": 2048, "tokens_per_second": 41e3, "peak_gib": 50.0},
        {"part": "match", "length": 4096, "tokens_per_second": 17e3, "peak_gib": 20.0},
        {"part": "match", "length": 4096, "tokens_per_second": 18.5e3, "peak_gib": 23.9},
        {"part": "long", "length": 32768, "tokens_per_second": 9e3, "peak_gib": 59.0},
    ]
    assert list(distill_e2b.targets(good)) == []
    bad = [row | {"tokens_per_second": row["tokens_per_second"] / 2, "peak_gib": 61.0} for row in good]
    lines = list(distill_e2b.targets([*bad, {"part": "dense", "failed": "OutOfMemoryError: no"}]))
    assert lines == [
        "dense: OutOfMemoryError: no",
        "stage 1: 20,500 tok/s, the target is 40,000",
        "stage 2 at 32,768 tokens: 61.0 GiB, at most 60",
        "stage 2: 0 tok/s in 24 GiB, the target is 18,000",
    ]


def test_rows_become_a_table_between_two_marks() -> None:
    columns = {"tokens": ("length", "{:,}"), "ms": ("ms", "{:.1f}")}
    table = results.costs([{"length": 4096, "ms": 1.25}, {"length": 8192, "failed": "no"}], columns)
    assert table == "| tokens | ms |\n|---|---|\n| 4,096 | 1.2 |\n| 8,192 |  |\n"
    page = results.between("a <here> old <there> z", "<here>", "<there>", table)
    assert page == f"a <here>\n{table}<there> z"
