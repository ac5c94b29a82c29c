"""Next-token training of a compact model on packed documents: the task that the training loop sees.

Legend: B batch, T time.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trihybrid.data.packing import Batch
from trihybrid.mixers.span import Span, contiguous
from trihybrid.models.compact.model import CompactModel
from trihybrid.ops.compiling import name_operators
from trihybrid.pretrain.compact_section import CompactTrainSection
from trihybrid.train.graph import GraphedGradients

logger = logging.getLogger(__name__)


def training_span(positions_BT: Tensor, leak: bool) -> Span:
    """Where packed inputs stand, from positions that restart at 0 where a document begins. That rows hold several
    documents is taken for granted, since to look would make a device wait; with `leak` each row is one document."""
    if leak:
        batch, length = positions_BT.shape
        return contiguous(batch, length, device=positions_BT.device)
    return Span(positions_BT, borders=True)


class CompactTask:
    """Mean cross-entropy in nats a token; every token of a row but its first is a target, a BOS too.

    Args:
        model: what is trained, on its device; its `compute_dtype` is that of the activations.
        section: compile, graph, leak and quantise_from.
    """

    def __init__(self, model: CompactModel, section: CompactTrainSection) -> None:
        self.model = model
        self.leak = section.leak
        self.quantise_from = section.quantise_from
        self._device = next(model.parameters()).device
        self._loss = self._tensor_loss
        if section.compile:
            name_operators()
            self._loss = torch.compile(self._tensor_loss)
        self._graph = section.graph and self._device.type == "cuda"
        if section.graph and not self._graph:
            logger.info("graph: without effect on %s", self._device.type)
        self._graphs: dict[float, GraphedGradients] = {}

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def roles(self) -> dict[str, str]:
        return self.model.roles()

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        batch = batch.to(self._device)
        return self._loss(batch.inputs, batch.next_tokens, batch.positions), {}

    def differentiate(self, batch: Batch, share: float) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Add `share` times the gradient of the batch's loss to the parameters' gradients; the loss."""
        if not self._graph:
            loss, metrics = self.loss(batch)
            (loss if share == 1 else share * loss).backward()
            return loss.detach(), metrics
        if share not in self._graphs:
            self._graphs[share] = GraphedGradients(self._loss, self.model.parameters(), share)
        batch = batch.to(self._device)
        return self._graphs[share](batch.inputs, batch.next_tokens, batch.positions), {}

    def tokens(self, batch: Batch) -> int:
        return batch.inputs.numel()

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """The batch as `parts` batches of equally many rows."""
        return batch.split(parts)

    def at(self, fraction: float, step: int) -> None:
        """Switch fake quantisation on from `quantise_from` of the run onwards; a pure function of `fraction`."""
        if self.quantise_from is not None:
            self.model.set_quantisation(fraction >= self.quantise_from)

    def _tensor_loss(self, inputs_BT: Tensor, targets_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Takes tensors alone, so that a compiled graph has no other inputs."""
        return self.model.loss(inputs_BT, targets_BT, training_span(positions_BT, self.leak))
