"""The benchmark of two GPUs, rehearsed in small by two processes: every form gives the losses of one."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.long


def test_every_form_gives_the_losses_of_one(run, tmp_path: Path) -> None:
    result = run(
        "distill_two_gpus", "--tiny", "--steps", "4", "--rows", "2", "--length", "32", "--json", str(tmp_path)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "distill_two_gpus.json").read_text())
    forms = [("one", 1), ("replicate", 2), ("shard", 2), ("context", 2), ("resume", 1)]
    assert [(row["stage"], row["form"], row["gpus"]) for row in rows] == [
        (stage, *form) for stage in ("match", "align") for form in forms
    ]
    assert [len(row["losses"]) for row in rows] == [4, 4, 4, 4, 2] * 2
    assert max(row["apart"] for row in rows) <= 1e-5


def test_forms_that_cannot_be_are_refused(run) -> None:
    for forms in ("context", "one,resume", "one,threads"):
        assert (
            f"--forms {forms}: some of one, replicate, shard, context, resume"
            in run("distill_two_gpus", "--forms", forms).stderr
        )
