"""The training loop: batch, loss, gradient, clip, update, log, checkpoint; interrupted or not, the same to
the bit.

That holds because everything that a step depends on is either a function of its number (batch, learning rate)
or in the checkpoint (parameters, optimizer state, torch's generators), on the same machine with the same
number of threads, as long as the task's own kernels are deterministic.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trihybrid.run.log import RunLog, StepRecord
from trihybrid.train.checkpoint import Checkpoints, Progress
from trihybrid.train.optim import Optimizers, build_optimizer
from trihybrid.train.schedule import factor
from trihybrid.train.section import TrainSection
from trihybrid.train.task import Task

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitSummary:
    """What a finished stage amounts to, interruptions included.

    Attributes:
        steps: steps done.
        loss: loss of the last step, before its update.
        tokens: tokens trained on.
        seconds: training time.
    """

    steps: int
    loss: float
    tokens: int
    seconds: float


def fit(
    task: Task,
    batches: Callable[[int], Any],
    section: TrainSection,
    checkpoints: Checkpoints,
    log: RunLog,
    resume: bool,
) -> FitSummary:
    """Train to the end of the stage.

    Args:
        task: what is trained; its parameters are changed in place.
        batches: step (from 0) -> batch; a pure function, so that a resumed run sees the same batches.
        section: loop, optimizer and schedule.
        checkpoints: where the state goes, every `checkpoint_every` steps and at the end.
        log: gets a row a step.
        resume: go on from the newest checkpoint, where there is one. False begins at step 0.

    Returns:
        The summary. A stage that was finished already is restored from its checkpoint and not trained again.

    Raises:
        ValueError: `resume` is False and there are checkpoints; a checkpoint does not fit; parameters or
            roles are wrong; the loss is no differentiable scalar.
        FloatingPointError: loss, gradient or updated parameters are not finite; names the step and the
            parameters. The checkpoints made before stay.
    """
    loop = section.loop
    parameters = task.parameters()
    optimizers = build_optimizer(parameters, task.roles(), section.optimizer)
    progress = _begin(parameters, optimizers, checkpoints, loop.seed, resume)
    if progress.step > loop.steps:
        raise ValueError(
            f"steps: {loop.steps}, but the newest checkpoint has {progress.step} steps done; "
            "start a new run directory, or restore the recipe"
        )
    log.resume(progress.step)
    if progress.step > 0:
        log.event("resume", {"from_step": progress.step})

    while progress.step < loop.steps:
        step, began = progress.step, time.perf_counter()
        rate = factor(step, section.schedule, loop.steps)
        optimizers.set_learning_rate(rate)
        optimizers.zero_grad()
        batch = batches(step)
        loss, metrics = task.loss(batch)
        _check_loss(loss, step)
        loss.backward()
        if step == 0:
            _report_untouched(parameters)
        norm = clip_gradients(parameters, section.optimizer.gradient_clip, step, loss.item())
        optimizers.step()

        tokens = task.tokens(batch)
        numbers = {name: float(value) for name, value in metrics.items()}
        seconds = time.perf_counter() - began
        progress = Progress(step + 1, loss.item(), progress.tokens + tokens, progress.seconds + seconds)
        log.step(
            StepRecord(
                step=step,
                steps=loop.steps,
                loss=progress.loss,
                learning_rate=section.optimizer.learning_rate * rate,
                gradient_norm=norm,
                tokens=progress.tokens,
                tokens_per_second=tokens / max(seconds, 1e-9),
                seconds=progress.seconds,
                metrics=numbers,
            )
        )
        if progress.step % loop.checkpoint_every == 0 or progress.step == loop.steps:
            _check_parameters(parameters, step)
            checkpoints.save(progress, parameters, optimizers)
            checkpoints.prune(loop.keep)
            saving = time.perf_counter() - began - seconds
            progress = replace(progress, seconds=progress.seconds + saving)

    return FitSummary(progress.step, progress.loss, progress.tokens, progress.seconds)


def clip_gradients(
    parameters: Mapping[str, nn.Parameter], limit: float | None, step: int, loss: float
) -> float:
    """Scale all gradients by min(1, limit / (norm + 1e-6)), norm being their global 2-norm, and return the
    norm before that.

    Args:
        parameters: name -> parameter with its gradient; those without one are passed over.
        limit: largest norm, or None to leave the gradients alone.
        step, loss: of this step, for the error.

    Raises:
        FloatingPointError: the loss or the norm is not finite; names the step and the parameters to blame.
    """
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm = total.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        blamed = [
            name
            for name, parameter in parameters.items()
            if parameter.grad is not None
            and not math.isfinite(torch.linalg.vector_norm(parameter.grad).item())
        ]
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {norm}; "
            f"gradients that are not finite: {_names(blamed)}; "
            "lower the learning rate or look at this step's batch, and resume from the last checkpoint"
        )
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), limit, total)
    return norm


def _begin(
    parameters: Mapping[str, nn.Parameter],
    optimizers: Optimizers,
    checkpoints: Checkpoints,
    seed: int,
    resume: bool,
) -> Progress:
    latest = checkpoints.latest()
    if latest is not None and not resume:
        raise ValueError(f"resume is off, but {latest} exists; resume, or start a new run directory")
    checkpoints.clean()
    if latest is not None:
        progress = checkpoints.load(latest, parameters, optimizers)
        _logger.info("resumed from %s: %d steps done", latest, progress.step)
        return progress
    if resume:
        _logger.info("nothing to resume in %s: starting at step 0", checkpoints.folder)
    torch.manual_seed(seed)
    return Progress()


def _check_loss(loss: Tensor, step: int) -> None:
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"step {step}: the task's loss has shape {list(loss.shape)} and "
            f"requires_grad={loss.requires_grad}; "
            "return one number that depends on the trainable parameters"
        )


def _check_parameters(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    blamed = [name for name, parameter in parameters.items() if not torch.isfinite(parameter).all()]
    if blamed:
        raise FloatingPointError(
            f"step {step}: the update left numbers that are not finite in {_names(blamed)}; "
            "no checkpoint is written; "
            "lower the learning rate, and resume from the last checkpoint"
        )


def _report_untouched(parameters: Mapping[str, nn.Parameter]) -> None:
    untouched = [name for name, parameter in parameters.items() if parameter.grad is None]
    if untouched:
        _logger.warning("the loss does not depend on %s: they stay as they are", _names(untouched))


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(listed[:8]) or "none"
    return shown if len(listed) <= 8 else f"{shown} and {len(listed) - 8} more"
