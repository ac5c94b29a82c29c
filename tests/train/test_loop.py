"""Training interrupted is training uninterrupted, to the bit; what is not finite is named."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

import trihybrid
from trihybrid.run import read_log


class Stop(BaseException):
    """Stands for an interruption from outside."""


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def interrupted_at(tiny: ModuleType, step: int):
    def batches(number: int) -> torch.Tensor:
        if number == step:
            raise Stop
        return tiny.batch_of(number)

    return batches


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(
    tiny: ModuleType, tmp_path: Path, optimizer: str
) -> None:
    whole, whole_summary = tiny.run_fit(tmp_path / "whole", optimizer)
    initial = tiny.TinyTask().parameters()
    for step in (2, 8, 17):  # before the first checkpoint, and between two
        with pytest.raises(Stop):
            tiny.run_fit(tmp_path / "parts", optimizer, interrupted_at(tiny, step))
        torch.manual_seed(step)  # whatever else used the generator in between
    parts, summary = tiny.run_fit(tmp_path / "parts", optimizer)

    assert same_bits(whole.parameters(), parts.parameters())
    assert not any(torch.equal(initial[name], whole.parameters()[name]) for name in initial)
    assert (summary.steps, summary.loss, summary.tokens) == (24, whole_summary.loss, 24 * 4 * 5)
    whole_rows, rows = (
        [row for row in read_log(tmp_path / name / "log.jsonl") if row["kind"] == "train"]
        for name in ("whole", "parts")
    )
    assert [row["step"] for row in rows] == list(range(24))
    for key in ("loss", "gradient_norm", "learning_rate", "tokens", "accuracy"):
        assert [row[key] for row in rows] == [row[key] for row in whole_rows]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_is_the_uninterrupted_one_on_cuda(
    tiny: ModuleType, tmp_path: Path, optimizer: str
) -> None:
    whole, _ = tiny.run_fit(tmp_path / "whole", optimizer, task=tiny.TinyTask(device="cuda"))
    with pytest.raises(Stop):
        tiny.run_fit(tmp_path / "parts", optimizer, interrupted_at(tiny, 8), tiny.TinyTask(device="cuda"))
    torch.manual_seed(8)
    parts, _ = tiny.run_fit(tmp_path / "parts", optimizer, task=tiny.TinyTask(device="cuda"))
    assert same_bits(whole.parameters(), parts.parameters())


def test_finished_stage_is_restored_and_not_trained_again(tiny: ModuleType, tmp_path: Path) -> None:
    first, summary = tiny.run_fit(tmp_path)
    again, repeated = tiny.run_fit(tmp_path, batches=interrupted_at(tiny, 0))
    assert same_bits(first.parameters(), again.parameters())
    assert (repeated.steps, repeated.loss, repeated.tokens) == (summary.steps, summary.loss, summary.tokens)
    assert len([row for row in read_log(tmp_path / "log.jsonl") if row["kind"] == "train"]) == 24


def test_only_the_newest_checkpoints_are_kept_and_the_last_step_has_one(
    tiny: ModuleType, tmp_path: Path
) -> None:
    tiny.run_fit(tmp_path, section=tiny.section_of(steps=11, keep=3))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000006", "step-000009", "step-000011"]


def test_starting_over_existing_checkpoints_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.run_fit(tmp_path, resume=False)
    with pytest.raises(ValueError, match=r"resume is off, but .*step-000024 exists"):
        tiny.run_fit(tmp_path, resume=False)


def test_global_generator_before_the_start_does_not_matter(tiny: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one, _ = tiny.run_fit(tmp_path / "one")
    torch.manual_seed(2)
    two, _ = tiny.run_fit(tmp_path / "two")
    other, _ = tiny.run_fit(tmp_path / "other", section=tiny.section_of(seed=6))
    assert same_bits(one.parameters(), two.parameters())
    assert not same_bits(one.parameters(), other.parameters())


def test_nan_in_one_gradient_names_step_and_parameter(tiny: ModuleType, tmp_path: Path) -> None:
    class Poisoned(tiny.TinyTask):  # type: ignore[name-defined]
        def loss(self, batch):
            loss, metrics = super().loss(batch)
            if torch.equal(batch, tiny.batch_of(7)):
                # The value 0 is finite; its derivative, infinity times 0, is not.
                loss = loss + torch.sqrt(self.tensors["decay"] * 0.0).sum()
            return loss, metrics

    task = Poisoned()
    with pytest.raises(FloatingPointError, match=r"step 7: .*not finite: decay;") as error:
        tiny.run_fit(tmp_path, task=task)
    assert "mix.weight" not in str(error.value)
    assert (tmp_path / "checkpoints" / "step-000006" / "checkpoint.json").is_file()
    assert all(torch.isfinite(tensor).all() for tensor in task.parameters().values())
    *rows, event = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert (event["event"], event["step"], event["batch"]) == ("not_finite", 7, "of step 7")


def test_loss_that_is_not_finite_stops_the_run(tiny: ModuleType, tmp_path: Path) -> None:
    class Infinite(tiny.TinyTask):  # type: ignore[name-defined]
        def loss(self, batch):
            loss, metrics = super().loss(batch)
            return loss + float("inf"), metrics

    with pytest.raises(FloatingPointError, match=r"step 0: loss inf, .*not finite: none;"):
        tiny.run_fit(tmp_path, task=Infinite())


def test_update_that_overflows_is_not_checkpointed(tiny: ModuleType, tmp_path: Path) -> None:
    class Vast(tiny.TinyTask):  # type: ignore[name-defined]
        def loss(self, batch):
            with torch.no_grad():
                if torch.equal(batch, tiny.batch_of(8)):
                    self.tensors["mix.bias"].fill_(float("-inf"))  # tanh makes -1 of it, with no gradient
            return super().loss(batch)

    with pytest.raises(FloatingPointError, match=r"step 8: .*not finite in mix.bias;"):
        tiny.run_fit(tmp_path, task=Vast())
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000006"]


def test_loss_without_a_gradient_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    class Detached(tiny.TinyTask):  # type: ignore[name-defined]
        def loss(self, batch):
            return super().loss(batch)[0].detach(), {}

    with pytest.raises(ValueError, match=r"shape \[\] and requires_grad=False"):
        tiny.run_fit(tmp_path, task=Detached())


def test_parameter_that_the_loss_ignores_is_named(
    tiny: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Ignoring(tiny.TinyTask):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.tensors["unused"] = torch.nn.Parameter(torch.ones(3))

        def roles(self):
            return {**tiny.ROLES, "unused": "vector"}

    with caplog.at_level(logging.WARNING):
        task, _ = tiny.run_fit(tmp_path, task=Ignoring(), section=tiny.section_of(steps=6))
    assert "does not depend on unused" in caplog.text
    assert task.tensors["unused"].tolist() == [1.0, 1.0, 1.0]
    again, summary = tiny.run_fit(tmp_path, task=Ignoring(), section=tiny.section_of(steps=6))
    assert summary.steps == 6 and same_bits(task.parameters(), again.parameters())


def test_killed_run_resumes_to_the_bit(tiny: ModuleType, tmp_path: Path) -> None:
    """SIGKILL in another process, resumed in this one; muon, because it brings adamw along."""
    source = Path(trihybrid.__file__).parents[1]
    command = [sys.executable, tiny.__file__, str(tmp_path / "killed"), "muon", "0.05"]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    whole, _ = tiny.run_fit(tmp_path / "whole", "muon")
    awaited = tmp_path / "killed" / "checkpoints" / "step-000009"
    deadline = time.monotonic() + 120.0
    while not awaited.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert awaited.exists() and not awaited.with_name("step-000024").exists()

    resumed, _ = tiny.run_fit(tmp_path / "killed", "muon")
    assert same_bits(whole.parameters(), resumed.parameters())
    rows = read_log(tmp_path / "killed" / "log.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(24))
    assert [row["from_step"] >= 9 for row in rows if row["kind"] == "event"] == [True]
