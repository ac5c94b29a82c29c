"""A conversion by two processes of torchrun, which share out the weights in stage 1 and the tokens of each row in stage
2, and leave a table on the host in both stages, is that of one; killed, it goes on with one, and no token is lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
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
OVERRIDES = [
    "stages.0.loop.steps=4",
    "stages.0.loop.batch_size=4",
    "stages.0.loop.accumulate=2",
    "stages.0.parallel=shard",
    "stages.0.tables=host",
    "stages.1.loop.steps=24",
    "stages.1.checkpointing=true",
    "stages.1.context=2",
    "stages.1.tables=host",
]
SCRIPT = "import torch\n\ntorch.set_default_dtype(torch.float64)\nfrom trihybrid.cli import main\n\nmain()\n"
"""In float64, though transformers' norms compute in float32: in float32 alone AdamW makes 1e-3 of the noise within
thirty steps."""


@pytest.fixture(scope="module")
def killed(micro_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory that two processes left, which were killed in the last stage."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "command.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), "distill"]
    options = [part for override in OVERRIDES for part in ("--set", override)]
    with open(folder / "output", "wb") as output:
        agent = subprocess.Popen(
            [sys.executable, *launch, str(micro_recipe), "--out", str(folder / "run"), *options],
            env=os.environ | {"PYTHONPATH": str(Path(trihybrid.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
        awaited = folder / "run" / "checkpoints" / "matched" / "step-000002"
        deadline = time.monotonic() + 400.0
        while not awaited.exists() and agent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        assert agent.wait(timeout=100) != 0, "it ended before it was killed; raise the steps of stage match"
    assert awaited.exists(), (folder / "output").read_text()
    assert not (folder / "run" / "matched").exists()
    return folder / "run"


@pytest.fixture(scope="module")
def one_rank(micro_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process, with all tables where the model is."""
    folder = tmp_path_factory.mktemp("rank") / "run"
    with float64():
        recipe = load_recipe(micro_recipe, [*OVERRIDES, "stages.0.tables=device", "stages.1.tables=device"])
        assert execute(recipe, folder) is not None
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


def same_curve(rows: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [(row["stage"], row["step"], row["tokens"]) for row in rows] == [
        (row["stage"], row["step"], row["tokens"]) for row in wanted
    ]
    for row, one in zip(rows, wanted, strict=True):
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-5), (row["stage"], row["step"])


def test_two_ranks_give_the_losses_and_the_teacher_of_one(killed: Path, one_rank: Path) -> None:
    rows = steps(killed)
    assert len(rows) >= 6 + 4 + 2
    same_curve(rows, steps(one_rank)[: len(rows)])
    names = [record.stage for record in Lineage(killed / "lineage.json").records]
    assert names == ["teacher", "operated", "aligned"]
    pieces = sorted(path.name for path in (killed / "checkpoints" / "aligned" / "step-000004").iterdir())
    assert [name for name in pieces if name.startswith("parameters")] == [
        f"parameters-{rank}-of-2.safetensors" for rank in range(2)
    ]
    # The new mixers begin at zero, where AdamW's step is the sign of a gradient that may be noise.
    ours, wanted = (load_file(run / "teacher" / "model.safetensors") for run in (killed, one_rank))
    for key, tensor in wanted.items():
        assert tensor.dtype == torch.float64
        assert relative_error(ours[key], tensor) <= 1e-6, key


def test_killed_checkpoints_of_two_ranks_go_on_with_one(
    killed: Path, micro_recipe: Path, one_rank: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    with float64():
        rows = execute(load_recipe(micro_recipe, OVERRIDES), run, resume=True)
    assert rows is not None and rows[-1]["stage"] == "matched"
    assert "context: 2, but one process is alone and computes whole rows" in caplog.text
    (event,) = (row for row in read_log(run / "log.jsonl") if row.get("event") == "resume")
    assert 2 <= event["from_step"] < 24
    same_curve(steps(run), steps(one_rank))


def test_a_context_is_a_divisor_of_the_processes_and_of_a_row(micro_recipe: Path) -> None:
    sixes = [f"{part}.loop.batch_size=6" for part in ("teacher.pretrain", "stages.0", "stages.1")]
    with pytest.raises(ValueError, match=r"context: 2 does not divide the 3 processes; give one of 1, 3, or"):
        check_recipe(load_recipe(micro_recipe, [*sixes, "stages.1.context=2"]), workers=3)
    with pytest.raises(
        ValueError, match=r"context: 3 does not divide loop\.sequence_length 16; give a divisor, or"
    ):
        load_recipe(micro_recipe, ["stages.1.context=3"])
    with pytest.raises(ValueError, match=r"graph: true with context 2, whose processes wait for each other"):
        load_recipe(micro_recipe, ["stages.1.context=2", "stages.1.graph=true"])
    # Four processes are two groups, of which each takes one of two rows.
    recipe = load_recipe(micro_recipe, ["stages.0.context=2", "stages.1.context=2"])
    check_recipe(recipe, workers=4)
    with pytest.raises(ValueError, match=r"batch_size: 2 does not divide into 1 parts for each of 4 workers"):
        check_recipe(load_recipe(micro_recipe, ["stages.1.context=2"]), workers=4)


def test_a_batch_that_does_not_divide_among_the_workers_is_refused_before_a_file(micro_recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size: 2 does not divide into 1 parts for each of 3 workers"):
        check_recipe(load_recipe(micro_recipe, ["teacher.pretrain.loop.batch_size=6"]), workers=3)
