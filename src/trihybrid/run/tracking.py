"""Trackers: TensorBoard, wandb or trackio, which get the numbers of each row of the log as it is written.

They are for watching. The log is the record: steps that are repeated after a resume are shown again by wandb and
trackio, and are in the log once.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from trihybrid.run.section import TrackerName, TrackingSection


class Tracker(Protocol):
    """Gets numbers."""

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a step of a stage."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


def open_trackers(section: TrackingSection, folder: Path, name: str) -> list[Tracker]:
    """The trackers that a recipe asks for.

    Args:
        section: which.
        folder: the run directory; TensorBoard's files go to `tensorboard` in it.
        name: of the run.

    Raises:
        ValueError: a tracker's package is not installed; names the extra.
    """
    check_trackers(section)
    return [_OPEN[tracker](section.project, folder, name) for tracker in section.to]


def check_trackers(section: TrackingSection) -> None:
    """See that the packages are there, before anything is written; errors as `open_trackers`."""
    for tracker in section.to:
        _package(tracker)


class _TensorBoard:
    def __init__(self, project: str, folder: Path, name: str) -> None:
        # A writer a stage, so that the steps of each count from 0; those after a resume replace the repeated ones.
        self._folder = folder / "tensorboard"
        self._make: Callable[..., Any] = _package("tensorboard").SummaryWriter
        self._writers: dict[str, Any] = {}

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._writers:
            self._writers[stage] = self._make(log_dir=str(self._folder / stage), purge_step=step)
        for name, value in values.items():
            self._writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Service:
    """wandb, and trackio, which has its interface."""

    def __init__(self, package: TrackerName, project: str, folder: Path, name: str) -> None:
        options = {"dir": str(folder)} if package == "wandb" else {}
        self._run = _package(package).init(project=project, name=name, **options)

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        # Steps of a stage begin at 0, and a service's own step may not fall.
        row = {f"{stage}/{key}": value for key, value in values.items()}
        self._run.log({**row, f"{stage}/step": step})

    def close(self) -> None:
        self._run.finish()


_OPEN: dict[TrackerName, Callable[[str, Path, str], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": lambda project, folder, name: _Service("wandb", project, folder, name),
    "trackio": lambda project, folder, name: _Service("trackio", project, folder, name),
}


def finite_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a row of the log a tracker can draw."""
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _package(tracker: TrackerName) -> Any:
    module = "torch.utils.tensorboard" if tracker == "tensorboard" else tracker
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"tracking.to: {tracker!r} is not installed ({error}); pip install 'trihybrid[tracking]', or leave it out"
        ) from error
