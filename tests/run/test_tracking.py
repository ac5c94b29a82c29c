"""Trackers get the numbers of every row; one that is not installed is an error before anything is written."""

import builtins
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trihybrid.run import RunLog, StepRecord
from trihybrid.run.section import TrackingSection
from trihybrid.run.tracking import check_trackers, open_trackers


class FakeRun:
    """A service's run that keeps what it got."""

    def __init__(self, **options: str) -> None:
        self.options, self.rows, self.finished = options, [], False

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


class FakeWriter:
    """A SummaryWriter that keeps what it got."""

    made: list["FakeWriter"] = []

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def write(folder: Path, trackers: list[Any]) -> None:
    for stage, steps in (("aligned", (4, 5)), ("matched", (0,))):
        with RunLog(folder / "log.jsonl", stage, stream=io.StringIO(), trackers=trackers) as log:
            for step in steps:
                metrics = {"kl": 0.25, "hidden": float("nan")}
                log.step(StepRecord(step, 6, 2.0, 1e-3, 0.5, 100, 50.0, 2.0, metrics))
    for tracker in trackers:
        tracker.close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_every_row_by_stage(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[FakeRun] = []
    module = ModuleType(name)
    module.init = lambda **options: runs.append(FakeRun(**options)) or runs[-1]
    monkeypatch.setitem(sys.modules, name, module)
    write(tmp_path, open_trackers(TrackingSection(to=[name], project="p"), tmp_path, "demo"))
    (run,) = runs
    assert (run.options["project"], run.options["name"]) == ("p", "demo") and run.finished
    assert [row["aligned/step"] for row in run.rows[:2]] == [4, 5]
    assert run.rows[2]["matched/loss"] == 2.0 and run.rows[2]["matched/kl"] == 0.25
    assert not any("hidden" in key or "kind" in key for row in run.rows for key in row)


def test_tensorboard_gets_a_writer_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(FakeWriter, "made", [])
    write(tmp_path, open_trackers(TrackingSection(to=["tensorboard"]), tmp_path, "demo"))
    aligned, matched = FakeWriter.made
    assert (aligned.log_dir, aligned.purge_step) == (str(tmp_path / "tensorboard" / "aligned"), 4)
    assert ("loss", 2.0, 5) in aligned.scalars and ("kl", 0.25, 0) in matched.scalars
    assert aligned.closed and matched.closed


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_one_that_is_missing_is_named_with_its_cure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [key for key in sys.modules if name in key.split(".")]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__

    def absent(module: str, *arguments: Any, **options: Any) -> Any:
        if name in module.split("."):
            raise ImportError(f"No module named {name!r}")
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(ValueError, match=rf"'{name}' is not installed .*pip install 'trihybrid\[tracking\]'"):
        check_trackers(TrackingSection(to=[name]))
    check_trackers(TrackingSection())
