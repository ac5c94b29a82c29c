"""A conversion by two processes of torchrun is that of one, and goes on with another number of them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trihybrid
from trihybrid.recipe.execute import check_recipe, execute
from trihybrid.recipe.load import load_recipe
from trihybrid.run import Lineage, read_log
from trihybrid.testing import relative_error

pytestmark = pytest.mark.slow
OVERRIDES = ["stages.0.loop.steps=4", "stages.0.loop.batch_size=4", "stages.0.loop.accumulate=2"]
SCRIPT = "import torch\n\ntorch.set_default_dtype(torch.float64)\nfrom trihybrid.cli import main\n\nmain()\n"
"""In float64, though transformers' norms compute in float32: in float32 alone AdamW makes 1e-3 of the noise within
thirty steps."""


@pytest.fixture(scope="module")
def two_ranks(micro_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory that two processes left."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "command.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), "distill"]
    options = [part for override in OVERRIDES for part in ("--set", override)]
    done = subprocess.run(
        [sys.executable, *launch, str(micro_recipe), "--out", str(folder / "run"), *options],
        env=os.environ | {"PYTHONPATH": str(Path(trihybrid.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("figures:") == 1
    return folder / "run"


@pytest.fixture(scope="module")
def one_rank(micro_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process."""
    folder = tmp_path_factory.mktemp("rank") / "run"
    with float64():
        assert execute(load_recipe(micro_recipe, OVERRIDES), folder) is not None
    return folder


@contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_log(run / "log.jsonl") if row["kind"] == "train"]


def same_curve(run: Path, other: Path) -> None:
    rows, wanted = steps(run), steps(other)
    assert [(row["stage"], row["step"], row["tokens"]) for row in rows] == [
        (row["stage"], row["step"], row["tokens"]) for row in wanted
    ]
    for row, one in zip(rows, wanted, strict=True):
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-5), (row["stage"], row["step"])


def test_two_ranks_give_the_losses_and_the_teacher_of_one(two_ranks: Path, one_rank: Path) -> None:
    same_curve(two_ranks, one_rank)
    assert [record.stage for record in Lineage(two_ranks / "lineage.json").records] == [
        "teacher",
        "operated",
        "aligned",
        "matched",
    ]
    # The new mixers begin at zero, where AdamW's step is the sign of a gradient that may be noise.
    ours, wanted = (load_file(run / "teacher" / "model.safetensors") for run in (two_ranks, one_rank))
    for key, tensor in wanted.items():
        assert tensor.dtype == torch.float64
        assert relative_error(ours[key], tensor) <= 1e-6, key


def test_checkpoints_of_two_ranks_go_on_with_one(
    two_ranks: Path, micro_recipe: Path, one_rank: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(two_ranks, tmp_path / "run"))
    document = json.loads((run / "lineage.json").read_text())
    document["records"] = document["records"][:-1]
    (run / "lineage.json").write_text(json.dumps(document))
    shutil.rmtree(run / "matched")
    shutil.rmtree(run / "checkpoints" / "matched" / "step-000004")
    with float64():
        rows = execute(load_recipe(micro_recipe, OVERRIDES), run, resume=True)
    assert rows is not None and rows[-1]["stage"] == "matched"
    events = [row for row in read_log(run / "log.jsonl") if row.get("event") == "resume"]
    assert [event["from_step"] for event in events] == [2]
    same_curve(run, one_rank)


def test_a_batch_that_does_not_divide_among_the_workers_is_refused_before_a_file(micro_recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size: 2 does not divide into 1 parts for each of 3 workers"):
        check_recipe(load_recipe(micro_recipe, ["teacher.pretrain.loop.batch_size=6"]), workers=3)
