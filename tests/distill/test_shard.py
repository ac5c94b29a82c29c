"""Weights shared out to two processes train as whole ones do, and go on with any number of processes; and so do rows in
parts, of two processes and of four."""

import importlib.util
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
from trihybrid.testing import relative_error
from trihybrid.train import ALONE

pytestmark = pytest.mark.long
SCRIPT = Path(__file__).with_name("sharded_fit.py")


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sharded_fit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one(cases: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves of each case."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("one")
    for case in cases.CASES:
        task, _ = cases.fit_case(case, folder / case, ALONE)
        save_file(task.whole_parameters(), folder / f"{case}.safetensors")
    return folder


def launch(folder: Path, count: int) -> None:
    """Let so many processes fit their cases in a folder."""
    paths = [Path(trihybrid.__file__).parents[1], SCRIPT.parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(rank), str(count)],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]
    errors = [worker.communicate(timeout=400)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * count, "".join(errors)


@pytest.fixture(scope="module")
def two(cases: ModuleType, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave, the first of whose cases goes on from a checkpoint of one."""
    folder = tmp_path_factory.mktemp("two")
    cases.half_way(one / "extend", folder / "extend-from-one")
    launch(folder, 2)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes leave, two of which share each row."""
    folder = tmp_path_factory.mktemp("four")
    launch(folder, 4)
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [row for row in read_log(folder / "log.jsonl") if row["kind"] == "train"]


def apart(folder: Path, other: Path, case: str, name: str) -> float:
    """The greatest relative error of a parameter."""
    found, wanted = load_file(folder / f"{name}.safetensors"), load_file(other / f"{case}.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[key].dtype == tensor.dtype for key, tensor in wanted.items())
    return max(relative_error(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize(
    ("case", "loss", "norm"),
    [("align", 1e-12, 1e-9), ("match", 1e-9, 1e-9), ("extend", 1e-9, 1e-9), ("untied", 1e-2, 5e-2)],
)
def test_losses_norms_and_tokens_are_those_of_one(
    one: Path, two: Path, case: str, loss: float, norm: float
) -> None:
    """In the last case all but the masters is bfloat16."""
    rows, wanted = rows_of(two / case), rows_of(one / case)
    assert [row["step"] for row in rows] == list(range(4))
    for row, alone in zip(rows, wanted, strict=True):
        assert row["tokens"] == alone["tokens"]
        assert row["loss"] == pytest.approx(alone["loss"], rel=loss)
        for key in [key for key in alone if key.startswith("gradient")]:
            assert row[key] == pytest.approx(alone[key], rel=norm), key


@pytest.mark.parametrize("case", ["align", "match", "extend"])
def test_what_trained_is_what_one_trains(one: Path, two: Path, case: str) -> None:
    """The averages over the steps."""
    assert apart(two, one, case, case) <= 1e-9


@pytest.mark.parametrize("processes", ["two", "four"])
@pytest.mark.parametrize(
    "name", ["align-parts", "match-parts", "extend-parts", "align-parts-shard", "match-parts-shard"]
)
def test_rows_in_parts_train_as_whole_ones(
    one: Path, request: pytest.FixtureRequest, name: str, processes: str
) -> None:
    """Four processes are two by two."""
    folder: Path = request.getfixturevalue(processes)
    case = name.partition("-")[0]
    for row, alone in zip(rows_of(folder / name), rows_of(one / case), strict=True):
        assert row["tokens"] == alone["tokens"]
        for key in ("loss", *(key for key in alone if "/" in key), "gradient_norm"):
            assert row[key] == pytest.approx(alone[key], rel=1e-9), key
    assert apart(folder, one, case, name) <= 1e-9


def test_masters_are_float32_and_whole(one: Path, two: Path) -> None:
    found, wanted = (load_file(folder / "untied.safetensors") for folder in (two, one))
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in wanted.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_a_table_on_the_host_changes_nothing(two: Path) -> None:
    """It is neither split nor gathered; the head beside it is. Its rows are the same numbers, so all else is too."""
    assert apart(two, two, "untied", "untied-host") == 0.0
    losses, wanted = ([row["loss"] for row in rows_of(two / name)] for name in ("untied-host", "untied"))
    assert losses == wanted


def test_a_killed_run_of_two_goes_on_to_the_bit(two: Path) -> None:
    assert rows_of(two / "match-again")[0]["step"] == 2
    assert apart(two, two, "match", "match-again") == 0.0
    last, again = (rows_of(two / name)[-1]["loss"] for name in ("match", "match-again"))
    assert last == again
    names = [path.name for path in sorted((two / "match-again" / "checkpoints").iterdir())]
    assert names == ["step-000002", "step-000004"]


def test_two_go_on_from_one(one: Path, two: Path) -> None:
    """Muon's momenta are read row by row."""
    assert [row["step"] for row in rows_of(two / "extend-from-one")] == [2, 3]
    assert apart(two, one, "extend", "extend-from-one") <= 1e-9


@pytest.mark.parametrize("case", ["match", "extend"])
def test_one_goes_on_from_two(cases: ModuleType, one: Path, two: Path, tmp_path: Path, case: str) -> None:
    cases.half_way(two / case, tmp_path)
    task, summary = cases.fit_case(case, tmp_path, ALONE)
    assert summary.steps == 4 and summary.tokens == rows_of(one / case)[-1]["tokens"]
    wanted = load_file(one / f"{case}.safetensors")
    for name, tensor in task.whole_parameters().items():
        assert relative_error(tensor, wanted[name]) <= 1e-9, name


def test_each_file_has_the_rows_of_one_process(two: Path) -> None:
    """No tensor stands in a checkpoint twice, and no pickle either."""
    folder = two / "match" / "checkpoints" / "step-000004"
    parts = ("average", "optimizer", "parameters", "random")
    names = {f"{part}-{rank}-of-2.safetensors" for part in parts for rank in range(2)}
    assert {path.name for path in folder.iterdir()} == {"checkpoint.json", *names}
    whole = load_file(two / "match.safetensors")
    pieces = [load_file(folder / f"parameters-{rank}-of-2.safetensors") for rank in range(2)]
    for name, tensor in whole.items():
        assert torch.cat([piece[name] for piece in pieces]).shape == tensor.shape


def test_a_damaged_piece_is_refused_by_name(cases: ModuleType, two: Path, tmp_path: Path) -> None:
    cases.half_way(two / "extend", tmp_path)
    piece = tmp_path / "checkpoints" / "step-000002" / "optimizer-1-of-2.safetensors"
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer-1-of-2\.safetensors: damaged: wanted sha256"):
        cases.fit_case("extend", tmp_path, ALONE)


def test_each_process_holds_about_half(two: Path) -> None:
    shares = [float((two / f"share-{rank}").read_text()) for rank in range(2)]
    assert all(0.4 < share < 0.62 for share in shares), shares


def test_a_nan_of_one_process_names_its_layer_on_both(two: Path) -> None:
    errors = [(two / f"error-{rank}").read_text() for rank in range(2)]
    assert "layer: none in the forward pass of worker 0" in errors[0]
    assert ".2.self_attn.rwkv7" in errors[1].partition("layer: ")[2]
    assert not (two / "broken" / "checkpoints").exists()
