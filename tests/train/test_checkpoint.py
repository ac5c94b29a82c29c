"""A checkpoint is whole or not there, and a wrong one is refused before anything is changed."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

import trihybrid.train.pieces as pieces_module
from trihybrid.train import Checkpoints, OptimizerSection, Progress, build_optimizer


def trained(tiny: ModuleType, name: str = "adamw", steps: int = 2):
    task = tiny.TinyTask()
    optimizers = build_optimizer(task.parameters(), task.roles(), OptimizerSection(name=name))
    for step in range(steps):
        optimizers.zero_grad()
        task.loss(tiny.batch_of(step))[0].backward()
        optimizers.step()
    return task, optimizers


def fresh(tiny: ModuleType, name: str = "adamw"):
    return trained(tiny, name, steps=0)


def saved(tiny: ModuleType, folder: Path, step: int = 2) -> tuple[Checkpoints, Path]:
    checkpoints = Checkpoints(folder, "stage", "parent")
    task, optimizers = trained(tiny)
    return checkpoints, checkpoints.save(Progress(step, 0.1 + 0.2, 40, 1.5), task.parameters(), optimizers)


def refused(tiny: ModuleType, checkpoints: Checkpoints, path: Path, match: str) -> None:
    """Loading fails with this message and leaves parameters and optimizer as they were."""
    task, optimizers = fresh(tiny)
    with pytest.raises(ValueError, match=match):
        checkpoints.load(path, task.parameters(), optimizers)
    untouched = tiny.TinyTask().parameters()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in task.parameters().items())
    assert optimizers.state_tensors() == {}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_everything_comes_back_to_the_bit(tiny: ModuleType, tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, "stage", "parent")
    task, optimizers = trained(tiny, name)
    progress = Progress(2, 0.1 + 0.2, 40, 1.5)
    torch.manual_seed(3)
    torch.rand(7)
    path = checkpoints.save(progress, task.parameters(), optimizers)
    drawn = torch.rand(5)

    other, other_optimizers = fresh(tiny, name)
    assert checkpoints.load(path, other.parameters(), other_optimizers) == progress
    assert torch.equal(torch.rand(5), drawn)
    for before, after in (
        (task.parameters(), other.parameters()),
        (optimizers.state_tensors(), other_optimizers.state_tensors()),
    ):
        assert before.keys() == after.keys()
        assert all(
            torch.equal(tensor, after[key]) and tensor.dtype == after[key].dtype
            for key, tensor in before.items()
        )


@pytest.mark.parametrize("part", ["parameters", "optimizer", "random"])
def test_truncated_part_is_refused(tiny: ModuleType, tmp_path: Path, part: str) -> None:
    checkpoints, path = saved(tiny, tmp_path)
    file = path / f"{part}.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    match = f"{part}.safetensors: truncated.*wanted {size} bytes, found {size - 1}; delete"
    refused(tiny, checkpoints, path, match)


@pytest.mark.parametrize("part", ["parameters", "optimizer", "random"])
def test_flipped_bit_is_refused(tiny: ModuleType, tmp_path: Path, part: str) -> None:
    checkpoints, path = saved(tiny, tmp_path)
    file = path / f"{part}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(tiny, checkpoints, path, f"{part}.safetensors: damaged: wanted sha256")


def test_missing_part_and_damaged_manifest_are_refused(tiny: ModuleType, tmp_path: Path) -> None:
    checkpoints, path = saved(tiny, tmp_path)
    (path / "optimizer.safetensors").unlink()
    refused(tiny, checkpoints, path, "optimizer.safetensors: missing")
    (path / "checkpoint.json").write_text('{"version": 1')
    refused(tiny, checkpoints, path, "checkpoint.json is damaged")


def test_other_stage_other_parent_and_other_version_are_refused(tiny: ModuleType, tmp_path: Path) -> None:
    _, path = saved(tiny, tmp_path)
    changed = (
        "the recipe of this stage changed: wanted new, found stage; "
        "start a new run directory or restore the recipe"
    )
    refused(tiny, Checkpoints(tmp_path, "new", "parent"), path, changed)
    moved = "another parent: wanted new, found parent; start"
    refused(tiny, Checkpoints(tmp_path, "stage", "new"), path, moved)
    manifest = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "version": 99}))
    refused(tiny, Checkpoints(tmp_path, "stage", "parent"), path, "version 99, wanted 1")


def test_other_model_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    checkpoints, path = saved(tiny, tmp_path)
    parameters, optimizers = fresh(tiny)[0].parameters(), fresh(tiny)[1]
    fewer = {name: tensor for name, tensor in parameters.items() if name != "decay"}
    with pytest.raises(ValueError, match=r"lacks \[\], holds besides \['decay'\]"):
        checkpoints.load(path, fewer, optimizers)
    wider = {**parameters, "decay": torch.nn.Parameter(torch.zeros(9))}
    with pytest.raises(ValueError, match=r"'decay': wanted torch.float32 \[9\], found torch.float32 \[8\]"):
        checkpoints.load(path, wider, optimizers)


def test_leftovers_are_ignored_and_removed(tiny: ModuleType, tmp_path: Path) -> None:
    checkpoints, path = saved(tiny, tmp_path)
    shutil.copytree(path, tmp_path / "temporary-step-000004")  # killed before the rename
    shutil.copytree(path, tmp_path / "step-000005")
    (tmp_path / "step-000005" / "checkpoint.json").unlink()
    assert checkpoints.latest() == path
    checkpoints.clean()
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_fit_removes_leftovers(tiny: ModuleType, tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / "temporary-step-000004"
    leftover.mkdir(parents=True)
    (leftover / "parameters.safetensors").write_bytes(b"half")
    tiny.run_fit(tmp_path)
    assert not leftover.exists()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interrupted_save_leaves_nothing(
    tiny: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interruption: type[BaseException],
) -> None:
    checkpoints, path = saved(tiny, tmp_path)
    write = pieces_module.save_file
    written = []

    def interrupted_write(tensors, filename):
        written.append(filename)
        if len(written) == 2:
            raise interruption
        write(tensors, filename)

    monkeypatch.setattr(pieces_module, "save_file", interrupted_write)
    task, optimizers = trained(tiny, steps=3)
    with pytest.raises(interruption):
        checkpoints.save(Progress(3), task.parameters(), optimizers)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert checkpoints.latest() == path


def test_latest_counts_and_does_not_sort_by_letters(tiny: ModuleType, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "stage", "parent")
    assert checkpoints.latest() is None
    task, optimizers = fresh(tiny)
    for step in (999_999, 1_000_000, 7):
        checkpoints.save(Progress(step), task.parameters(), optimizers)
    latest = checkpoints.latest()
    assert latest is not None and latest.name == "step-1000000"
    with pytest.raises(ValueError, match="step-000007 exists already"):
        checkpoints.save(Progress(7), task.parameters(), optimizers)
    checkpoints.prune(2)
    assert [item.name for item in checkpoints.finished()] == ["step-999999", "step-1000000"]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="keep: 0"):
        checkpoints.prune(0)


def test_only_safetensors_and_json_are_written(tiny: ModuleType, tmp_path: Path) -> None:
    _, path = saved(tiny, tmp_path)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
