"""What a step may be made of: parts, warm-up runs and a task that follows the run; and a GPU that is not waited for."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from trihybrid.run import read_log
from trihybrid.train import AverageSection, TrainSection
from trihybrid.train.stage import Stage

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
)


class Stop(BaseException):
    """Stands for an interruption from outside."""


def trace(folder: Path) -> list[dict]:
    return [row for row in read_log(folder / "log.jsonl") if row["kind"] == "train"]


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_is_the_batch(tiny: ModuleType, tmp_path: Path, optimizer: str, parts: int) -> None:
    tasks = [tiny.SplitTask(dropout=0.0, dtype=torch.float64) for _ in range(2)]
    _, whole = tiny.run_fit(tmp_path / "whole", task=tasks[0], section=tiny.section_of(optimizer))
    section = tiny.section_of(optimizer, accumulate=parts)
    _, cut = tiny.run_fit(tmp_path / "parts", task=tasks[1], section=section)
    for name, tensor in tasks[0].parameters().items():
        torch.testing.assert_close(tasks[1].parameters()[name], tensor, rtol=1e-9, atol=1e-12)
    assert cut.tokens == whole.tokens
    for row, wanted in zip(trace(tmp_path / "parts"), trace(tmp_path / "whole"), strict=True):
        for key in ("loss", "gradient_norm", "accuracy"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-6)


def test_parts_count_as_the_task_weighs_them(tiny: ModuleType, tmp_path: Path) -> None:
    """Rows of different worth: row 0 counts once, row 1 twice, and so on."""

    class WeightedTask(tiny.SplitTask):
        def loss(self, batch: torch.Tensor):
            losses = [super(WeightedTask, self).loss(row[None])[0] for row in batch]
            weights = [self.weight(row[None]) for row in batch]
            return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights), {}

        def weight(self, batch: torch.Tensor) -> float:
            return float(1 + batch[:, 0].sum())

    tasks = [WeightedTask(dropout=0.0, dtype=torch.float64) for _ in range(2)]
    for task, parts in zip(tasks, (1, 4), strict=True):
        section = tiny.section_of(steps=6, accumulate=parts)
        tiny.run_fit(tmp_path / str(parts), task=task, section=section)
    for name, tensor in tasks[0].parameters().items():
        torch.testing.assert_close(tasks[1].parameters()[name], tensor, rtol=1e-9, atol=1e-12)
    for row, wanted in zip(trace(tmp_path / "4"), trace(tmp_path / "1"), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-9)


def test_a_task_that_cannot_split_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loop\.accumulate: 2, but TinyTask cannot split"):
        tiny.run_fit(tmp_path, section=tiny.section_of(accumulate=2))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_warm_up_runs_leave_no_trace(tiny: ModuleType, tmp_path: Path, optimizer: str, device: str) -> None:
    """Dropout would show a generator that was not put back; resuming, moments that were not."""
    asked = []

    def batches(step: int) -> torch.Tensor:
        asked.append(step)
        if step == 8 and asked.count(8) == 1:
            raise Stop
        return tiny.batch_of(step)

    task = tiny.TinyTask(device=device)
    plain, _ = tiny.run_fit(tmp_path / "plain", optimizer, task=task)
    section = tiny.section_of(optimizer, warmup_runs=3)
    with pytest.raises(Stop):
        tiny.run_fit(tmp_path / "warm", batches=batches, task=tiny.TinyTask(device=device), section=section)
    warm, _ = tiny.run_fit(
        tmp_path / "warm", batches=batches, task=tiny.TinyTask(device=device), section=section
    )
    assert asked[:3] == [0, 0, 1]
    assert same_bits(plain.parameters(), warm.parameters())
    keys = ("step", "loss", "gradient_norm", "accuracy", "tokens")
    traces = [[[row[key] for key in keys] for row in trace(tmp_path / name)] for name in ("plain", "warm")]
    assert traces[0] == traces[1]


def test_a_task_is_told_how_far_the_run_is(tiny: ModuleType, tmp_path: Path) -> None:
    class Watching(tiny.TinyTask):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.told: list[tuple[float, int]] = []

        def at(self, fraction: float, step: int) -> None:
            self.told.append((fraction, step))

    def batches(step: int) -> torch.Tensor:
        if step == 8:
            raise Stop
        return tiny.batch_of(step)

    first, second, third = Watching(), Watching(), Watching()
    with pytest.raises(Stop):
        tiny.run_fit(tmp_path, batches=batches, task=first)
    tiny.run_fit(tmp_path, task=second)
    tiny.run_fit(tmp_path, task=third)
    assert first.told == [(step / 24, step) for step in range(9)]
    assert second.told == [(step / 24, step) for step in range(6, 25)]
    assert third.told == [(1.0, 24)]


def test_muon_follows_its_own_rate_and_momentum(tiny: ModuleType, tmp_path: Path) -> None:
    """The first step with momentum 0 and rate r in the shape scale moves the matrix by r times an orthogonal one."""
    section = TrainSection.model_validate(
        {
            "loop": {"steps": 1},
            "optimizer": {
                "name": "muon",
                "learning_rate": 0.001,
                "weight_decay": 0.0,
                "muon": {
                    "learning_rate": 0.5,
                    "scale": "shape",
                    "coefficients": "polar",
                    "momentum_start": 0.0,
                    "momentum_warmup_steps": 10,
                },
            },
            "schedule": {"kind": "constant"},
        }
    )
    before = tiny.TinyTask().parameters()
    task, _ = tiny.run_fit(tmp_path, section=section)
    moved = {name: tensor.detach() - before[name].detach() for name, tensor in task.parameters().items()}
    assert torch.linalg.svdvals(moved["mix.weight"] / 0.5).tolist() == pytest.approx([1.0] * 8, abs=0.15)
    assert moved["mix.bias"].abs().max().item() == pytest.approx(0.001, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_not_finite_on_cuda_is_named_a_step_later_and_not_saved(
    tiny: ModuleType, tmp_path: Path
) -> None:
    class Poisoned(tiny.TinyTask):  # type: ignore[name-defined]
        def loss(self, batch):
            loss, metrics = super().loss(batch)
            if torch.equal(batch, tiny.batch_of(8)):
                loss = loss + torch.sqrt(self.tensors["decay"] * 0.0).sum()
            return loss, metrics

    with pytest.raises(FloatingPointError, match=r"step 8: .*not finite: decay;"):
        tiny.run_fit(tmp_path, task=Poisoned(device="cuda"))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000006"]
    assert [row["step"] for row in trace(tmp_path)] == list(range(8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_on_cuda_waits_for_nothing(
    tiny: ModuleType, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises at every operation that makes the CPU wait for the GPU, until the checkpoint at the end."""

    class Watched(tiny.TinyTask):  # type: ignore[name-defined]
        def loss(self, batch):
            torch.cuda.set_sync_debug_mode("error")
            return super().loss(batch)

    save = Stage._save

    def save_in_peace(stage: Stage, *arguments: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        save(stage, *arguments)

    monkeypatch.setattr(Stage, "_save", save_in_peace)
    batches = {step: tiny.batch_of(step).cuda() for step in range(24)}
    section = tiny.section_of(optimizer, steps=4, checkpoint_every=4, warmup_runs=0)
    section = section.model_copy(update={"average": AverageSection(horizon=0.5)})
    try:
        tiny.run_fit(tmp_path, batches=batches.__getitem__, task=Watched(device="cuda"), section=section)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [row["step"] for row in trace(tmp_path)] == list(range(4))
