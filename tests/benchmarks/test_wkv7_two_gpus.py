"""The benchmark of WKV-7 over two GPUs, rehearsed in small by two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trihybrid
from trihybrid.testing.wkv7_cases import KINDS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "wkv7_two_gpus.py"


@pytest.mark.long
def test_two_are_one_on_every_input(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(Path(trihybrid.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SCRIPT), "--tiny", "--heads", "2", "--json", str(tmp_path)]
    result = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "wkv7_two_gpus.json").read_text())
    assert [row.get("kind") for row in rows] == [*KINDS, None]
    assert max(max(row["one"], row["two"], row["apart"]) for row in rows[:-1]) <= 1e-5
