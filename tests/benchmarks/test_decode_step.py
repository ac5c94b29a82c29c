"""The benchmark of a decoding step, rehearsed in small on a CPU."""

import json
from pathlib import Path

import pytest


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
