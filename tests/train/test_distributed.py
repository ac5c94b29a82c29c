"""Two workers are one with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import trihybrid
from trihybrid.run import read_log
from trihybrid.train import ALONE, Workers, fit, process_group


@pytest.fixture(scope="module")
def two_workers(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes on the CPU left."""
    folder = tmp_path_factory.mktemp("workers")
    script = str(Path(__file__).with_name("distributed_fit.py"))
    source = Path(trihybrid.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), "2"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "".join(errors)
    return folder


@pytest.fixture(scope="module")
def cases(tiny: ModuleType) -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import distributed_fit
    finally:
        sys.path.pop(0)
    return distributed_fit


@pytest.mark.long  # tests/recipe/test_two_ranks.py starts two processes for all of this
@pytest.mark.parametrize(
    ("case", "tolerance"), [("adamw-float64", 1e-12), ("muon-float64", 1e-12), ("muon-float32", 1e-6)]
)
def test_two_workers_train_as_one_with_the_whole_batch(
    cases: ModuleType, two_workers: Path, tmp_path: Path, case: str, tolerance: float
) -> None:
    task, summary = cases.fit_case(case, tmp_path / case, ALONE)
    found = [load_file(two_workers / f"{case}-{rank}.safetensors") for rank in range(2)]
    for name, tensor in task.parameters().items():
        assert torch.equal(found[0][name], found[1][name])
        assert (found[0][name] - tensor).norm() <= tolerance * tensor.norm()
    rows, wanted = (
        [row for row in read_log(folder / case / "log.jsonl") if row["kind"] == "train"]
        for folder in (two_workers, tmp_path)
    )
    assert [row["step"] for row in rows] == list(range(6))
    for row, other in zip(rows, wanted, strict=True):
        assert row["tokens"] == other["tokens"]
        for key in ("loss", "gradient_norm"):
            assert row[key] == pytest.approx(other[key], rel=tolerance)
        assert row["accuracy"] == pytest.approx(other["accuracy"], rel=1e-6)
    assert summary.averaged


@pytest.mark.long
def test_the_first_workers_clock_ends_all_at_one_step(two_workers: Path) -> None:
    steps = [load_file(two_workers / f"seconds-{rank}.safetensors")["steps"].item() for rank in range(2)]
    assert steps[0] == steps[1] > 1
    (checkpoint,) = (two_workers / "seconds" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{steps[0]:06d}"


def test_a_single_worker_asks_nobody() -> None:
    tensor = torch.ones(3)
    ALONE.average([tensor])
    ALONE.broadcast([tensor])
    ALONE.share_generators()
    ALONE.wait()
    assert ALONE.first
    assert ALONE.gather(tensor) is tensor
    assert ALONE.first_value(2.5) == 2.5
    assert not ALONE.differ([1.0])


def test_a_batch_that_does_not_divide_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    section = tiny.section_of(batch_size=6, accumulate=2)
    with pytest.raises(ValueError, match=r"loop\.batch_size: 6 does not divide into 2 parts for each of 2"):
        fit(tiny.SplitTask(), tiny.batch_of, section, None, None, False, Workers(0, 2))


def test_workers_who_share_rows_take_one_share_of_a_batch(tiny: ModuleType) -> None:
    groups = [Workers(rank, 6, context=3) for rank in range(6)]
    assert [(workers.share, workers.shares) for workers in groups] == [(0, 2)] * 3 + [(1, 2)] * 3
    assert Workers(3, 6).part() is None
    section = tiny.section_of(batch_size=6, accumulate=2)
    with pytest.raises(ValueError, match=r"loop\.batch_size: 6 does not divide into 2 parts for each of 2"):
        fit(tiny.SplitTask(), tiny.batch_of, section, None, None, False, groups[0])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("tpu",), "'tpu' is neither 'cuda' nor 'cpu'"),
        (("cpu", "file:///nowhere"), "with rank None and count None; give all three"),
        (("cpu",), "torchrun did not start this process"),
    ],
)
def test_a_group_that_cannot_be_is_refused(arguments: tuple[str, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match), process_group(*arguments):
        pass
