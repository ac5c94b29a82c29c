"""Training: loop, optimizers by role, schedules and checkpoints. Knows no task, no model and no data."""

from trihybrid.train.checkpoint import Checkpoints, Progress
from trihybrid.train.loop import FitSummary, fit
from trihybrid.train.optim import DEFAULT_MULTIPLIERS, ROLES, Optimizers, build_optimizer
from trihybrid.train.schedule import factor
from trihybrid.train.section import LoopSection, OptimizerSection, Role, ScheduleSection, TrainSection
from trihybrid.train.task import Task

__all__ = [
    "DEFAULT_MULTIPLIERS",
    "ROLES",
    "Checkpoints",
    "FitSummary",
    "LoopSection",
    "OptimizerSection",
    "Optimizers",
    "Progress",
    "Role",
    "ScheduleSection",
    "Task",
    "TrainSection",
    "build_optimizer",
    "factor",
    "fit",
]
