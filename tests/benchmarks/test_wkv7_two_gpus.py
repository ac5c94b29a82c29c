"""The benchmark of WKV-7 over two GPUs, rehearsed in small by two processes."""

import json
from pathlib import Path

import pytest

from trihybrid.testing.wkv7_cases import KINDS


@pytest.mark.long
def test_two_are_one_on_every_input(run, tmp_path: Path) -> None:
    result = run("wkv7_two_gpus", "--tiny", "--heads", "2", "--json", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "wkv7_two_gpus.json").read_text())
    assert [row.get("kind") for row in rows] == [*KINDS, None]
    assert max(max(row["one"], row["two"], row["apart"]) for row in rows[:-1]) <= 1e-5
