"""benchmarks/sliding_gradient.py: what it makes of its rows, and one small measurement."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import sliding_gradient as benchmark


def test_a_measurement_compares_with_the_definition() -> None:
    sizes = argparse.Namespace(heads=2, groups=1, width=8, window=64, flex=False)
    rows = list(benchmark.measure(256, sizes, torch.device("cpu"), errors=True))
    assert [row["way"] for row in rows] == [benchmark.PEER, "blocked"]
    assert all(row["error"] <= 1e-5 for row in rows)
    assert rows[1]["peak_bytes"] < rows[0]["peak_bytes"]


def row(way: str, length: int, ms: float, peak: int) -> benchmark.Row:
    return {"way": way, "length": length, "ms": ms, "peak_bytes": peak}


def test_targets_name_what_is_missed() -> None:
    peer = [row(benchmark.PEER, 8192, 40.0, 10), row(benchmark.PEER, 16384, 160.0, 40)]
    good = [row("blocked", 4096, 6.0, 2), row("blocked", 8192, 11.0, 4), row("blocked", 16384, 22.0, 8)]
    assert list(benchmark.targets([*peer, *good], gpu=True)) == []
    bad = [*good[:2], row("blocked", 16384, 40.0, 16)]
    assert list(benchmark.targets([*peer, *bad], gpu=True)) == [
        "blocked: ms grows 3.64 times to 16,384 tokens, at most 2.2",
        "blocked: peak_bytes grows 4.00 times to 16,384 tokens, at most 2.2",
        "4.0 times the peer's speed at 16,384 tokens, the target is 6.0",
    ]
    assert len(list(benchmark.targets([*peer, *bad], gpu=False))) == 1
    failed = [{"way": "flash", "length": 8192, "failed": "RuntimeError: no"}]
    assert list(benchmark.targets([*peer, *good, *failed], gpu=True)) == ["flash at 8,192: RuntimeError: no"]
