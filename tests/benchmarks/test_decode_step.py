"""The benchmark of a decoding step, rehearsed in small on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trihybrid

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decode_step.py"


@pytest.mark.long
def test_every_execution_is_the_float32_step(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(Path(trihybrid.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(tmp_path)]
    result = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "decode_step.json").read_text())
    assert [(row["execution"], row["batch"]) for row in rows] == [
        (name, batch) for batch in (1, 4) for name in ("graph", "kernels")
    ]
    assert max(max(row["logits"]) for row in rows) <= 1e-5
    assert max(row["states"] for row in rows) <= 1e-5
