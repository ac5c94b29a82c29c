"""What several workers save, any number of workers reads: every row once, and all or nothing."""

from collections.abc import Callable
from pathlib import Path
from threading import BrokenBarrierError
from types import ModuleType

import pytest
import torch
from torch import nn

import trihybrid.train.pieces as pieces_module
from thread_workers import by_threads
from trihybrid.train import Checkpoints, Optimizers, OptimizerSection, Progress, Workers, build_optimizer
from trihybrid.train.rows import Rows

Part = tuple[dict[str, nn.Parameter], Optimizers, dict[str, Rows]]


@pytest.fixture
def part_of(tiny: ModuleType) -> Callable[..., Part]:
    """Parameters and optimizers after one step: the rows of one worker of several, or all."""

    def part(rank: int, count: int, seed: int = 0) -> Part:
        task = tiny.TinyTask(seed=seed)
        rows = {name: Rows(tuple(p.shape), rank, count) for name, p in task.parameters().items()}
        own = {name: nn.Parameter(rows[name].cut(p.detach())) for name, p in task.parameters().items()}
        optimizers = build_optimizer(own, task.roles(), OptimizerSection(name="muon"))
        if count == 1:
            rows = {}
        for parameter in own.values():
            parameter.grad = parameter.detach() ** 2
        return own, optimizers, rows

    return part


def stepped(part: Part) -> Part:
    # Newton-Schulz of rows alone is another one, but has as many numbers to save.
    part[1].step()
    return part


def save(folder: Path, part_of: Callable[..., Part], count: int) -> list[Part]:
    """A checkpoint of so many workers, and what each of them had."""
    parts = [stepped(part_of(rank, count)) for rank in range(count)]

    def write(workers: Workers) -> None:
        parameters, optimizers, rows = parts[workers.rank]
        Checkpoints(folder, "stage", "parent").save(
            Progress(3), parameters, optimizers, rows=rows, workers=workers
        )

    by_threads(count, write)
    return parts


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 2), (3, 2), (2, 5), (4, 16)])
def test_every_row_comes_back_to_the_bit(
    part_of: Callable[..., Part], tmp_path: Path, writers: int, readers: int
) -> None:
    """Of 11 and of 8 rows, so that parts are short and empty."""
    parts = save(tmp_path, part_of, writers)
    checkpoints = Checkpoints(tmp_path, "stage", "parent")
    path = checkpoints.latest()
    assert path is not None
    found = [part_of(rank, readers, seed=9) for rank in range(readers)]
    for parameters, optimizers, rows in found:
        assert checkpoints.load(path, parameters, optimizers, rows=rows) == Progress(3)
    for name in parts[0][0]:
        assert torch.equal(*(torch.cat([part[0][name] for part in side]) for side in (parts, found))), name
    for name, tensor in found[0][1].state_tensors().items():
        states = [[part[1].state_tensors()[name] for part in side] for side in (parts, found)]
        assert torch.equal(*(torch.cat(side) if tensor.dim() else side[0] for side in states)), name


def test_rows_of_another_shape_are_refused(part_of: Callable[..., Part], tmp_path: Path) -> None:
    save(tmp_path, part_of, 2)
    checkpoints = Checkpoints(tmp_path, "stage", "parent")
    parameters, optimizers, rows = part_of(0, 2)
    rows["head"] = Rows((12, 8), 0, 2)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises(ValueError, match=r"'head': wanted \[12, 8\], found \[11, 8\]; resume with the model"):
        checkpoints.load(tmp_path / "step-000003", parameters, optimizers, rows=rows)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


def test_one_worker_that_cannot_write_leaves_no_checkpoint(
    part_of: Callable[..., Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pieces_module.save_file

    def full(tensors: dict, path: Path) -> None:
        if path.name == "optimizer-1-of-2.safetensors":
            raise OSError("no space left")
        write(tensors, path)

    monkeypatch.setattr(pieces_module, "save_file", full)
    with pytest.raises((OSError, BrokenBarrierError)):
        save(tmp_path, part_of, 2)
    assert list(tmp_path.iterdir()) == []
