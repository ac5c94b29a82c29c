"""Training: loop, optimizers by role, schedules and checkpoints. Knows no task, no model and no data."""

from trihybrid.train.average import Average
from trihybrid.train.checkpoint import Checkpoints, Progress
from trihybrid.train.distributed import ALONE, Workers, process_group
from trihybrid.train.loop import FitSummary, check_division, fit
from trihybrid.train.optim import DEFAULT_MULTIPLIERS, ROLES, Optimizers, build_optimizer
from trihybrid.train.rows import Rows
from trihybrid.train.schedule import factor
from trihybrid.train.section import (
    AverageSection,
    LoopSection,
    MuonSection,
    OptimizerSection,
    Role,
    ScheduleSection,
    TrainSection,
)
from trihybrid.train.task import (
    CompletesBatches,
    FollowsProgress,
    HasModule,
    Shards,
    SplitsBatches,
    Task,
    Weighs,
)

__all__ = [
    "ALONE",
    "DEFAULT_MULTIPLIERS",
    "ROLES",
    "Average",
    "AverageSection",
    "Checkpoints",
    "CompletesBatches",
    "FitSummary",
    "FollowsProgress",
    "HasModule",
    "LoopSection",
    "MuonSection",
    "OptimizerSection",
    "Optimizers",
    "Progress",
    "Role",
    "Rows",
    "ScheduleSection",
    "Shards",
    "SplitsBatches",
    "Task",
    "TrainSection",
    "Weighs",
    "Workers",
    "build_optimizer",
    "check_division",
    "factor",
    "fit",
    "process_group",
]
