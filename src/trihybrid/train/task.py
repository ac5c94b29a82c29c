"""The task: all that a training loop needs to know of what it trains.

The loop gets an opaque batch from a function of the step and hands it to the task, which knows the model, the
data and the losses. What a task may do besides, it shows by having the method: `CompletesBatches`,
`SplitsBatches`, `Weighs`, `FollowsProgress`, `Differentiates`, `HasModule`, `Shards`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from trihybrid.train.rows import Rows


class Task(Protocol):
    """What can be trained by `fit`."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by stable name, float32 (or float64) master weights of any shape; the same
        names in every process that resumes the stage, each parameter once.
        """
        ...

    def roles(self) -> dict[str, str]:
        """The role of each of those parameters: matrix, lowrank, decay, vector, embedding or head."""
        ...

    def loss(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The loss of a batch, a scalar with a gradient graph, and further numbers (scalars) for the log.
        Randomness comes from torch's generators only: they are saved and restored, others are not.
        """
        ...

    def tokens(self, batch: Any) -> int:
        """Tokens that the batch trains on, for the account of tokens and tokens a second."""
        ...


@runtime_checkable
class CompletesBatches(Protocol):
    """A task that adds to a batch where it is made: on the host, ahead of its step, in another thread."""

    def complete(self, batch: Any) -> Any:
        """The batch with what `loss` needs beside it; a pure function of the batch and of what does not train."""
        ...


@runtime_checkable
class SplitsBatches(Protocol):
    """A task whose batches can be cut, for accumulation and for several workers."""

    def split(self, batch: Any, parts: int) -> Sequence[Any]:
        """Cut a batch into `parts` batches in order: the mean of their losses, weighted where the task weighs them, is
        the loss of the whole, up to rounding. A batch that cannot be cut so is a ValueError.
        """
        ...


@runtime_checkable
class Weighs(Protocol):
    """A task whose parts of a batch do not all count alike, as where some tokens are no targets."""

    def weight(self, batch: Any) -> float:
        """What a batch counts in the mean over parts and workers, above 0; known before its loss."""
        ...


@runtime_checkable
class FollowsProgress(Protocol):
    """A task that changes on the way, as one that begins to quantise late."""

    def at(self, fraction: float, step: int) -> None:
        """Called before each step, and once more when the stage is done: `fraction` in [0, 1] of the run's steps (of
        its seconds, where those end it) and `step` steps are behind. What it does must be a pure function of
        `fraction`, so that a resumed run finds the task as it was; it draws no random numbers.
        """
        ...


@runtime_checkable
class Differentiates(Protocol):
    """A task that sees to its gradients itself."""

    def differentiate(self, batch: Any, share: float) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Add `share` times the gradient of the batch's loss to the gradients of the parameters. What `loss` returns,
        without gradient graphs.
        """
        ...


@runtime_checkable
class HasModule(Protocol):
    """A task whose loss is the work of one module, in which a number that is not finite can be looked for."""

    @property
    def module(self) -> nn.Module:
        """All that `loss` runs."""
        ...


@runtime_checkable
class Shards(Protocol):
    """A task that may hold some rows of its parameters only, as the other workers hold the others."""

    def rows(self) -> Mapping[str, Rows]:
        """The rows of every parameter; empty where this worker holds whole ones. With rows, `differentiate` leaves
        those of the gradient's mean over the workers.
        """
        ...
