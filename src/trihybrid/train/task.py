"""The task: all that a training loop needs to know of what it trains.

The loop gets an opaque batch from a function of the step and hands it to the task, which knows the model, the
data and the losses.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn


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
