"""The training loop: batch, loss, gradient, clip, update, log, checkpoint; interrupted or not, the same to
the bit.

That holds because everything that a step depends on is either a function of its number (batch, learning rate,
momentum) or in the checkpoint (parameters, optimizer state, average, torch's generators), on the same machine with
the same number of threads and workers, as long as the task's own kernels are deterministic and no budget of seconds
makes the clock decide.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trihybrid.run.log import RunLog
from trihybrid.train.average import Average
from trihybrid.train.checkpoint import Checkpoints, Progress
from trihybrid.train.distributed import ALONE, Workers
from trihybrid.train.optim import Optimizers, build_optimizer
from trihybrid.train.rows import NO_ROWS, Rows
from trihybrid.train.section import LoopSection, TrainSection
from trihybrid.train.stage import Stage
from trihybrid.train.task import FollowsProgress, Shards, SplitsBatches, Task

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitSummary:
    """What a finished stage amounts to, interruptions included.

    Attributes:
        steps: steps done.
        loss: loss of the last step, before its update.
        tokens: tokens trained on, by all workers.
        seconds: training time.
        averaged: the task's parameters are now their average over the steps, not those of the last step.
    """

    steps: int
    loss: float
    tokens: int
    seconds: float
    averaged: bool = False


def _step_name(step: int) -> str:
    return f"of step {step}"


def fit(
    task: Task,
    batches: Callable[[int], Any],
    section: TrainSection,
    checkpoints: Checkpoints,
    log: RunLog | None,
    resume: bool,
    workers: Workers = ALONE,
    name_batch: Callable[[int], str] = _step_name,
) -> FitSummary:
    """Train to the end of the stage.

    Args:
        task: what is trained; its parameters are changed in place.
        batches: step (from 0) -> batch, or among several workers this worker's equal share of it; a pure function, so
            that a resumed run sees the same batches.
        section: loop, optimizer, schedule and average.
        checkpoints: where the state goes, every `checkpoint_every` steps and at the end.
        log: gets a row a step from the first worker; None for no log, as on the others.
        resume: go on from the newest checkpoint, where there is one. False begins at step 0.
        workers: the processes that train together; each calls this function.
        name_batch: step -> what its batch is called where it has to be named.

    Returns:
        The summary. A stage that was finished already is restored from its checkpoint and not trained again. With
        `section.average` the parameters end as their average; the last checkpoint keeps those of the last step too.

    Raises:
        ValueError: `resume` is False and there are checkpoints; a checkpoint does not fit; parameters or
            roles are wrong; the loss is no differentiable scalar; the batch does not divide into the parts asked for.
        FloatingPointError: loss, gradient or updated parameters are not finite; names the step, its batch, the
            parameters and, where the task has a module, the layer. The checkpoints made before stay.
    """
    loop = section.loop
    _check_parts(task, section, workers)
    parameters = task.parameters()
    rows = task.rows() if isinstance(task, Shards) else NO_ROWS
    assert not rows or rows.keys() == parameters.keys()
    optimizers = build_optimizer(parameters, task.roles(), section.optimizer, workers, rows)
    average = None if section.average is None else Average(parameters, section.average)
    progress = _begin(parameters, rows, optimizers, average, checkpoints, loop.seed, resume, workers)
    if progress.step > loop.steps:
        raise ValueError(
            f"steps: {loop.steps}, but the newest checkpoint has {progress.step} steps done; "
            "start a new run directory, or restore the recipe"
        )
    if not workers.first:
        log = None
    if log is not None:
        log.resume(progress.step)
        if progress.step > 0:
            log.event("resume", {"from_step": progress.step})
    if not progress.finished and progress.step < loop.steps:
        stage = Stage(task, batches, section, parameters, rows, optimizers, average, workers, name_batch)
        progress = stage.run(progress, checkpoints, log)
    if isinstance(task, FollowsProgress):
        task.at(1.0, progress.step)
    averaged = average is not None and average.started
    if average is not None:
        if averaged:
            average.apply()
        else:
            _logger.warning(
                "average: the stage ended before it began; the parameters are those of the last step"
            )
    return FitSummary(progress.step, progress.loss, progress.tokens, progress.seconds, averaged)


def check_division(loop: LoopSection, workers: int) -> None:
    """See that a batch divides into equal parts.

    Raises:
        ValueError: `batch_size` is no multiple of `accumulate` times the number of workers, where a group that shares
            rows counts as one.
    """
    if loop.batch_size % (loop.accumulate * workers):
        raise ValueError(
            f"loop.batch_size: {loop.batch_size} does not divide into {loop.accumulate} parts for each of "
            f"{workers} workers; give a multiple of {loop.accumulate * workers}"
        )


def _check_parts(task: Task, section: TrainSection, workers: Workers) -> None:
    loop = section.loop
    if loop.accumulate > 1 and not isinstance(task, SplitsBatches):
        raise ValueError(
            f"loop.accumulate: {loop.accumulate}, but {type(task).__name__} cannot split a batch; give 1"
        )
    check_division(loop, workers.shares)


def _begin(
    parameters: Mapping[str, nn.Parameter],
    rows: Mapping[str, Rows],
    optimizers: Optimizers,
    average: Average | None,
    checkpoints: Checkpoints,
    seed: int,
    resume: bool,
    workers: Workers,
) -> Progress:
    latest = checkpoints.latest()
    if latest is not None and not resume:
        raise ValueError(f"resume is off, but {latest} exists; resume, or start a new run directory")
    progress = Progress()
    if latest is not None:
        progress = checkpoints.load(latest, parameters, optimizers, average, rows)
        _logger.info("resumed from %s: %d steps done", latest, progress.step)
    else:
        if resume:
            _logger.info("nothing to resume in %s: starting at step 0", checkpoints.folder)
        torch.manual_seed(seed)
    shapes = [rows[name].whole if name in rows else parameter.shape for name, parameter in parameters.items()]
    sizes = (len(shapes), sum(math.prod(shape) for shape in shapes))
    if workers.differ([progress.step, *sizes]):
        raise ValueError(
            f"workers: worker {workers.rank} has {progress.step} steps done, {sizes[0]} tensors and {sizes[1]} "
            "parameters, another one differs; let all see the same run directory and recipe"
        )
    # Only now has every worker read what it resumes from.
    if workers.first:
        checkpoints.clean()
    if not rows:
        workers.broadcast([parameter.detach() for parameter in parameters.values()])
    workers.share_generators()
    return progress
