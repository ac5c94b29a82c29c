"""The steps of a stage: from a moment of the clock to trained, logged and saved parameters.

On a GPU nothing in a step waits for the GPU: its loss and gradient norm are read, checked and logged while the next
step runs, and before anything is saved.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trihybrid.run.log import RunLog, StepRecord
from trihybrid.train.average import Average
from trihybrid.train.blame import first_not_finite
from trihybrid.train.checkpoint import Checkpoints, Progress, random_state, restore_random_state
from trihybrid.train.clock import Clock, Moment
from trihybrid.train.distributed import ALONE, Workers
from trihybrid.train.gradients import GradientNorms, Readback, check_finite, layer_norms, some_names
from trihybrid.train.optim import Optimizers
from trihybrid.train.rows import Rows
from trihybrid.train.schedule import momentum
from trihybrid.train.section import TrainSection
from trihybrid.train.task import Differentiates, FollowsProgress, HasModule, SplitsBatches, Task, Weighs

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Done:
    """A step whose numbers may still be on their way."""

    step: int
    rate: float
    tokens: int
    names: list[str]
    numbers: Readback


class Stage:
    """The steps of a stage, from where it is to its end.

    Args:
        task, batches, section, workers, name_batch: as `fit` has them.
        parameters: the task's, at the start of this session.
        rows: of each parameter, where each worker holds some of them.
        optimizers, average: of these parameters; no average is kept if None.
    """

    def __init__(
        self,
        task: Task,
        batches: Callable[[int], Any],
        section: TrainSection,
        parameters: dict[str, nn.Parameter],
        rows: Mapping[str, Rows],
        optimizers: Optimizers,
        average: Average | None,
        workers: Workers,
        name_batch: Callable[[int], str],
    ) -> None:
        self.task, self.batches, self.section = task, batches, section
        self.name_batch = name_batch
        self.parameters, self.optimizers, self.average = parameters, optimizers, average
        self.rows, self.workers = rows, workers
        self.holders = workers if rows else ALONE
        self.on_gpu = any(parameter.is_cuda for parameter in parameters.values())
        self.compared = False

    def run(self, progress: Progress, checkpoints: Checkpoints, log: RunLog | None) -> Progress:
        """Train, log and save until the stage is over.

        Raises:
            ValueError, FloatingPointError: as `fit`.
        """
        self.log, self.progress = log, progress
        loop = self.section.loop
        self._warm_up(progress.step)
        self.clock = Clock(
            loop, self.section.schedule, progress.step, progress.seconds, self.workers, int(self.on_gpu)
        )
        self.marked = progress.seconds
        moment = self.clock.moment(progress.step)
        waiting: _Done | None = None
        while not moment.over:
            done = self._train(moment)
            if waiting is not None:
                self._record(waiting, moment)
            waiting = done
            moment = self.clock.moment(moment.step + 1)
            save = moment.over or moment.step % loop.checkpoint_every == 0
            if save or not self.on_gpu:
                self._record(waiting, moment)
                waiting = None
            if save:
                self._save(moment, checkpoints)
        return self.progress

    def _train(self, moment: Moment) -> _Done:
        """One step; on a GPU it has only been asked for when this returns."""
        step, section = moment.step, self.section
        if isinstance(self.task, FollowsProgress):
            self.task.at(moment.fraction, step)
        self.optimizers.set_learning_rate(moment.factor)
        self.optimizers.set_momentum(momentum(step, section.optimizer.muon))
        batch = self.batches(step)
        loss, metrics = self._gradients(batch, step)
        if step == 0:
            _report_untouched(self.parameters)
        norms = GradientNorms(self.parameters, self.holders)
        numbers = Readback(
            {
                "loss": loss,
                "norm": norms.total,
                "norms": norms.each_P,
                **{f"metric.{name}": value for name, value in metrics.items()},
            }
        )
        if not self.on_gpu:
            self._check(step, norms.names, numbers)
        norms.clip(section.optimizer.gradient_clip)
        self.optimizers.step()
        if self.average is not None:
            self.average.update(moment.fraction, moment.expected_steps)
        rate = section.optimizer.learning_rate * moment.factor
        tokens = self.task.tokens(batch) * self.workers.count
        return _Done(step, rate, tokens, norms.names, numbers)

    def _gradients(self, batch: Any, step: int) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Leave the gradient of the mean over all parts and workers in the parameters; that mean of the loss, and of
        each metric. Parts count alike, unless the task weighs them.
        """
        self.optimizers.zero_grad()
        parts = self._parts(batch)
        shares = self._shares(parts)
        found = [self._backward(part, step, share) for part, share in zip(parts, shares, strict=True)]
        loss, metrics = found[0] if shares == [1.0] else _mean(found, shares)
        if self.workers.count == 1:
            return loss, metrics
        self._compare_gradients()
        # Those of rows are means already.
        whole = () if self.rows else self.parameters.values()
        gradients = [parameter.grad for parameter in whole if parameter.grad is not None]
        shared = [loss.clone(), *(torch.zeros_like(loss) + value for value in metrics.values())]
        self.workers.average([*gradients, *shared])
        return shared[0], dict(zip(metrics, shared[1:], strict=True))

    def _parts(self, batch: Any) -> Sequence[Any]:
        count = self.section.loop.accumulate
        if count == 1:
            return [batch]
        assert isinstance(self.task, SplitsBatches)
        return self.task.split(batch, count)

    def _shares(self, parts: Sequence[Any]) -> list[float]:
        """What the gradient of each part is multiplied with before the mean over the workers: they sum to 1 on average
        over the workers."""
        if not isinstance(self.task, Weighs) or len(parts) * self.workers.count == 1:
            return [1 / len(parts)] * len(parts)
        weights = [self.task.weight(part) for part in parts]
        whole = self.workers.total(sum(weights)) / self.workers.count
        return [weight / whole for weight in weights]

    def _backward(self, part: Any, step: int, share: float) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Add a part's share of the gradient to the parameters; its loss and metrics, without graphs."""
        if isinstance(self.task, Differentiates):
            return self.task.differentiate(part, share)
        loss, metrics = self.task.loss(part)
        _check_loss(loss, step)
        (loss if share == 1 else share * loss).backward()
        detached = {
            name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()
        }
        return loss.detach(), detached

    def _compare_gradients(self) -> None:
        """See once that the workers' gradients can be added up."""
        if not self.compared and self.workers.differ([p.grad is None for p in self.parameters.values()]):
            raise ValueError(
                "workers: the loss depends on other parameters here than on another worker; "
                "let it depend on the same ones whatever the data"
            )
        self.compared = True

    def _record(self, done: _Done, moment: Moment) -> None:
        """Check and log a step that was made."""
        numbers = self._check(done.step, done.names, done.numbers)
        seconds = self.clock.elapsed()
        tokens = self.progress.tokens + done.tokens
        self.progress = Progress(done.step + 1, numbers["loss"].item(), tokens, seconds)
        if self.log is not None:
            self.log.step(
                StepRecord(
                    step=done.step,
                    steps=moment.expected_steps,
                    loss=self.progress.loss,
                    learning_rate=done.rate,
                    gradient_norm=numbers["norm"].item(),
                    tokens=tokens,
                    tokens_per_second=done.tokens / max(seconds - self.marked, 1e-9),
                    seconds=seconds,
                    metrics={
                        name.removeprefix("metric."): number.item()
                        for name, number in numbers.items()
                        if name.startswith("metric.")
                    }
                    | layer_norms(done.names, numbers["norms"]),
                )
            )
        self.marked = seconds

    def _check(self, step: int, names: list[str], numbers: Readback) -> dict[str, Tensor]:
        """The numbers of a step, if they are finite; else the error says where they stopped being so."""
        read = numbers.read()
        try:
            check_finite(step, read["loss"].item(), read["norm"].item(), names, read["norms"])
        except FloatingPointError as error:
            broken = [
                name.removeprefix("metric.") for name, value in read.items() if not value.isfinite().all()
            ]
            metrics = [name for name in broken if name not in ("loss", "norm", "norms")]
            where = {"batch": self.name_batch(step), "layer": self._layer(step), "metrics": metrics}
            if self.log is not None:
                self.log.event("not_finite", {"step": step, **where})
            raise FloatingPointError(
                f"{error}; batch: {where['batch']}; layer: {where['layer']}; metrics that are not finite: "
                f"{some_names(metrics)}"
            ) from None
        return read

    def _layer(self, step: int) -> str:
        """Where this worker's share of a step stops being finite, as far as that can still be seen."""
        if not isinstance(self.task, HasModule):
            return "not looked for"
        broken = sum(not torch.isfinite(parameter).all() for parameter in self.parameters.values())
        # All or none of the workers run the batch again.
        if self.workers.total(broken) > 0:
            # On a GPU a step is checked while the next one runs.
            return "not to be told any more, the update has gone into the parameters"
        task, parts = self.task, self._parts(self.batches(step))
        found = first_not_finite(task.module, lambda: [self.task.loss(part) for part in parts])
        return found or f"none in the forward pass of worker {self.workers.rank}, so in the backward pass"

    def _save(self, moment: Moment, checkpoints: Checkpoints) -> None:
        _check_parameters(self.parameters, moment.step - 1, self.holders)
        loss, tokens = self.progress.loss, self.progress.tokens
        seconds = self.workers.first_value(self.clock.elapsed())
        self.progress = Progress(moment.step, loss, tokens, seconds, finished=moment.over)
        if self.holders.count > 1 or self.workers.first:
            what = self.progress, self.parameters, self.optimizers, self.average
            checkpoints.save(*what, self.rows, self.holders)
        if self.workers.first:
            checkpoints.prune(self.section.loop.keep)
        self.workers.wait()
        # The step after it is not to look slow.
        self.marked = self.clock.elapsed()

    def _warm_up(self, step: int) -> None:
        """Make whole steps on one batch, and undo them: what compiles at its first use has compiled then."""
        runs = self.section.loop.warmup_runs
        if runs == 0:
            return
        if isinstance(self.task, FollowsProgress):
            self.task.at(step / self.section.loop.steps, step)
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        state = {name: tensor.clone() for name, tensor in self.optimizers.state_tensors().items()}
        random = random_state()
        batch = self.batches(step)
        for _ in range(runs):
            self.optimizers.set_learning_rate(0.0)
            self._gradients(batch, step)
            norms = GradientNorms(self.parameters, self.holders)
            norms.clip(self.section.optimizer.gradient_clip)
            self.optimizers.step()
        self.optimizers.zero_grad()
        self.optimizers.load_state_tensors(state)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(kept[name])
        restore_random_state(random)
        if self.on_gpu:
            torch.cuda.synchronize()
        self.workers.wait()
        _logger.info("warmed up with %d steps, and undid them", runs)


def _mean(
    found: Sequence[tuple[Tensor, Mapping[str, Tensor | float]]], shares: Sequence[float]
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """The weighted sum of the parts' losses, and that of each metric."""
    loss = sum(share * loss for (loss, _), share in zip(found, shares, strict=True))
    assert isinstance(loss, Tensor)
    return loss, {
        name: sum(share * numbers[name] for (_, numbers), share in zip(found, shares, strict=True))
        for name in found[0][1]
    }


def _check_loss(loss: Tensor, step: int) -> None:
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"step {step}: the task's loss has shape {list(loss.shape)} and "
            f"requires_grad={loss.requires_grad}; "
            "return one number that depends on the trainable parameters"
        )


def _check_parameters(parameters: Mapping[str, nn.Parameter], step: int, holders: Workers) -> None:
    blamed = [name for name, parameter in parameters.items() if not torch.isfinite(parameter).all()]
    if holders.total(len(blamed)) > 0:
        where = some_names(blamed) if blamed else "another worker's rows"
        raise FloatingPointError(
            f"step {step}: the update left numbers that are not finite in {where}; "
            "no checkpoint is written; "
            "lower the learning rate, and resume from the last checkpoint"
        )


def _report_untouched(parameters: Mapping[str, nn.Parameter]) -> None:
    untouched = [name for name, parameter in parameters.items() if parameter.grad is None]
    if untouched:
        _logger.warning("the loss does not depend on %s: they stay as they are", some_names(untouched))
