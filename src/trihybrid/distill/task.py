"""A loss of distillation as the training loop wants it, with weights that are whole or shared out to the workers."""

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from trihybrid.data.packing import Batch
from trihybrid.distill.host_table import LookedUpBatch, host_tables, look_up
from trihybrid.distill.shard import Losses, Sharded
from trihybrid.distill.trained import roles_of
from trihybrid.train.distributed import Workers
from trihybrid.train.rows import NO_ROWS, Rows

_logger = logging.getLogger(__name__)


class LossTask:
    """A task whose loss is the work of one module; a class below this one says how to call it.

    Args:
        module: the loss and its student.
    """

    def __init__(self, module: Losses) -> None:
        self.module = module
        self._sharded: Sharded | None = None

    def shard(self, workers: Workers) -> None:
        """Let each worker hold a part of the weights only; see `Sharded`. They must be on the CPU before."""
        self._sharded = Sharded(self.module, workers)
        _logger.info(
            "weights are shared out: each of %d workers holds its rows of %d bytes of layers, and of the tables",
            workers.count,
            self._sharded.gathered,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.module.trained if self._sharded is None else self._sharded.parameters

    def rows(self) -> Mapping[str, Rows]:
        """The rows of every parameter that this worker holds, where weights are shared out."""
        return NO_ROWS if self._sharded is None else self._sharded.rows

    def roles(self) -> dict[str, str]:
        return roles_of(self.module.student, self.module.trained)

    @property
    def whole(self) -> bool:
        """Whether the student is in one piece here: its weights not shared out, its tables not left on the host."""
        return self._sharded is None and not host_tables(self.module.student.model)

    def complete(self, batch: Batch) -> Batch:
        """The batch, ids on the host, with the rows of the student's tables that are there."""
        return look_up(self.module.student.model, batch)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor] | None]:
        """What the module reads of a batch: ids and positions [B, T], and the rows."""
        return batch.inputs, batch.positions, batch.rows if isinstance(batch, LookedUpBatch) else None

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        raise NotImplementedError

    def differentiate(self, batch: Batch, share: float) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Add `share` times the gradient of the batch's loss to the parameters' gradients; what `loss` returns."""
        loss, parts = self.loss(batch)
        (loss if share == 1 else share * loss).backward()
        if self._sharded is not None:
            self._sharded.take_gradients()
        return loss.detach(), parts

    def tokens(self, batch: Batch) -> int:
        return batch.inputs.numel()

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """The batch as `parts` batches of equally many rows."""
        return batch.split(parts)

    def whole_parameters(self) -> dict[str, Tensor]:
        """What has trained, whole: all workers ask at once, and those after the first get nothing where weights are
        shared out."""
        if self._sharded is None:
            return {name: parameter.detach() for name, parameter in self.module.trained.items()}
        return self._sharded.whole_parameters()
