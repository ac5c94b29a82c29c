"""The benchmark of two GPUs, rehearsed in small by two processes: every form gives the losses of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trihybrid

pytestmark = pytest.mark.long
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "distill_two_gpus.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(Path(trihybrid.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], env=environment, text=True, capture_output=True
    )


def test_every_form_gives_the_losses_of_one(tmp_path: Path) -> None:
    result = run("--tiny", "--steps", "4", "--rows", "2", "--length", "32", "--json", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "distill_two_gpus.json").read_text())
    forms = [("one", 1), ("replicate", 2), ("shard", 2), ("context", 2), ("resume", 1)]
    assert [(row["stage"], row["form"], row["gpus"]) for row in rows] == [
        (stage, *form) for stage in ("match", "align") for form in forms
    ]
    assert [len(row["losses"]) for row in rows] == [4, 4, 4, 4, 2] * 2
    assert max(row["apart"] for row in rows) <= 1e-5


def test_forms_that_cannot_be_are_refused() -> None:
    for forms in ("context", "one,resume", "one,threads"):
        assert (
            f"--forms {forms}: some of one, replicate, shard, context, resume" in run("--forms", forms).stderr
        )
