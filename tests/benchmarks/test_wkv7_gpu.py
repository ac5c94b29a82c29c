"""Every part and measure of the GPU benchmark of WKV-7, rehearsed on a CPU: tiny shapes in Triton's interpreter, and
exact stand-ins for the GPU's clocks and for the peer."""

import contextlib
import importlib.metadata
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from exact_fla import chunk_rwkv7
from interpreted import MARKS

pytestmark = MARKS
FOLDER = Path(__file__).parents[2] / "benchmarks"
SHAPES = ((1, 17, 2, 16), (2, 16, 2, 16), (1, 18, 2, 16), (1, 19, 2, 16))


class Event:
    """Every measurement takes a millisecond."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


@pytest.fixture
def modules(load, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The benchmark and its worker, which runs in this process."""
    load("trihybrid.ops.wkv7.triton")
    load("trihybrid.ops.wkv7.decode")
    monkeypatch.syspath_prepend(str(FOLDER))
    import wkv7_gpu
    import wkv7_gpu_worker as worker

    stand_ins = {
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "Event": Event,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 2**20,
        "reset_peak_memory_stats": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: contextlib.nullcontext(),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    constants = {"DEVICE": "cpu", "CACHE": 2048, "SECONDS": 0.0, "MOST": 1, "LEAST": 1}
    for name, value in (
        constants | {"DECODE_HEADS": 1, "GROUPS": 1, "tune_in_parallel": lambda: None}
    ).items():
        monkeypatch.setattr(worker, name, value)
    constants = {
        "HEADLINE": SHAPES[0],
        "SHAPES": SHAPES,
        "GROUPED_SHAPES": SHAPES[:1],
        "LONG": (1, 4, 2, 16),
    }
    for name, value in (constants | {"WIDTHS": (16,), "BATCHES": (2,), "LENGTHS": (3,)}).items():
        monkeypatch.setattr(wkv7_gpu, name, value)

    def work(name: str, folder: str, waiting: list, modes: str) -> Iterator[dict]:
        shown: list[dict] = []
        monkeypatch.setattr(worker, "show", lambda row: shown.append(json.loads(json.dumps(row))))
        monkeypatch.setattr(sys, "argv", ["worker", name, folder, modes])
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(waiting)))
        worker.main()
        assert sum("started" in row for row in shown) == len(waiting)
        yield from (row for row in shown if "task" in row)

    monkeypatch.setattr(wkv7_gpu, "work", work)
    rooms = SimpleNamespace(
        chunk_rwkv7=chunk_rwkv7,
        fused_recurrent_rwkv7=lambda *tokens, **options: tokens,
        fused_mul_recurrent_rwkv7=lambda *tokens, **options: tokens,
    )
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", rooms)
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda of: "0.6.0" if of == "fla-core" else version(of)
    )
    return wkv7_gpu, worker


def test_clocks(modules: tuple[ModuleType, ModuleType]) -> None:
    _, worker = modules
    calls: list[int] = []
    assert worker.median_ms(lambda: calls.append(0)) == 1.0 and len(calls) == 4
    assert worker.wall_ms(lambda: calls.append(0)) > 0
    assert worker.copy_ms(64) == 1.0


def test_every_measure_of_every_part(
    modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    benchmark, worker = modules
    for clock in ("median_ms", "wall_ms"):
        monkeypatch.setattr(worker, clock, lambda call: (call(), 1.0)[1])
    (tmp_path / "peer" / "fla").mkdir(parents=True)
    peers = ["--fla", f"0.6.0={tmp_path / 'peer'}", "--peer-widths", "16", "--modes", "lower_bound"]
    for arguments in (
        ["--part", "ours", "--measure", "speed", "--headline"],
        ["--part", "ours", "--measure", "grouped,decode"],
        ["--part", "ours", "--measure", "errors", "--kinds", "random"],
        ["--part", "fla", *peers, "--kinds", "random", "--headline"],
    ):
        monkeypatch.setattr(sys, "argv", ["wkv7_gpu.py", *arguments, "--json", str(tmp_path)])
        # A clock that says a millisecond for everything misses the targets.
        assert benchmark.main() == 1
    rows = json.loads((tmp_path / "wkv7_gpu.json").read_text())
    assert not [row for row in rows if "failed" in row]
    found = {(row["worker"], row["task"], row["mode"]) for row in rows}
    modes = {"grouped": ("shared", "repeated"), "decode": ("in place", "fresh state"), "copy": ("copy",)}
    modes |= dict.fromkeys(("speed", "errors"), ("triton", "torch, chunked"))
    assert {("ours", task, mode) for task, names in modes.items() for mode in names} <= found
    assert {("fla-0.6.0", task, "lower_bound C=64") for task in ("speed", "errors")} <= found
    errors = [row["errors"] for row in rows if row["task"] == "errors" and row["mode"] == "triton"]
    assert len(errors) == 2 and all(max(found.values()) < 1e-2 for found in errors)
    printed = capsys.readouterr().out
    assert "missed: forward at (1, 17, 2, 16): 1.000 ms, the target is 0.250 ms" in printed
    assert "missed: repeated over shared at (1, 17, 2, 16): 1.00, the target is 1.3" in printed
