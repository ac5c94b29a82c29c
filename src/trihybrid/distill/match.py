"""Stage 2: the student's distribution follows the teacher's while its hidden states stay near.

    L = KL(p_T || p_S) + weight * mean over layers and rows of |h_S - h_T|^2 / |h_T|^2

Both distributions are softcapped where the teacher's is, and plain elsewhere; the student runs on its own hidden
states, so what it gets wrong below it must bear above (cumulative alignment). Layers below the first difference are
computed once and not counted.
Legend: B batch, T time, D model width, N = B T.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trihybrid.data.packing import Batch
from trihybrid.distill.align import relative_distance
from trihybrid.distill.graph import Graphed
from trihybrid.distill.pair import Pair
from trihybrid.distill.recompute import run_layer
from trihybrid.distill.task import LossTask
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.decoder.model import Stream
from trihybrid.ops.divergence import VOCABULARY_BLOCK, softcapped_divergence

logger = logging.getLogger(__name__)


class Matching(nn.Module):
    """One outer forward that carries both streams in lockstep and returns the losses.

    Args:
        pair: teacher and student.
        temperature: of both distributions.
        alignment_weight: weight of the hidden alignment.
        allowed_V: token ids that the KL compares, or None for all.
        chunk, block: tokens, and words of the vocabulary, whose logits exist at once. Where a block is all words, its
            logits are kept for the gradient, not computed again.
        checkpointing: recompute the student's layers in the backward pass; the teacher's keep nothing anyway.
        kept_layers: with checkpointing, that many layers at the top keep what they computed: more memory, less time.
        top_k: compare the teacher's most likely tokens and one bucket for all others; None compares all.
    """

    def __init__(
        self,
        pair: Pair,
        temperature: float = 1.0,
        alignment_weight: float = 0.1,
        allowed_V: Tensor | None = None,
        chunk: int = 1024,
        checkpointing: bool = False,
        kept_layers: int = 0,
        top_k: int | None = None,
        block: int = VOCABULARY_BLOCK,
    ) -> None:
        super().__init__()
        self.pair, self.temperature, self.alignment_weight = pair, temperature, alignment_weight
        self.allowed_V, self.chunk, self.block, self.top_k = allowed_V, chunk, block, top_k
        self.recomputed = len(pair.student.model.layers) - kept_layers if checkpointing else 0
        self.layers = pair.together()

    @property
    def student(self) -> HybridForCausalLM:
        """What trains."""
        return self.pair.student

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Its parameters that do."""
        return self.pair.trained

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, rows: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts (kl, hidden, agreement, the distance after each layer) for int64 tokens and positions
        [B, T], and rows of tables that are on the host."""
        return self.losses(*self.prepare(input_ids, position_ids, rows))

    def prepare(
        self, input_ids: Tensor, position_ids: Tensor, rows: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Stream]:
        """What `losses` begins with: hidden states of the embedding [B, T, D] and the stream."""
        return self.pair.prepare(input_ids, position_ids, rows)

    def losses(self, teacher_BTD: Tensor, stream: Stream) -> tuple[Tensor, dict[str, Tensor]]:
        """The same from what `Pair.prepare` returns; waits for no device."""
        pair, model = self.pair, self.pair.student.model
        first = pair.first_difference
        for index in range(first):
            teacher_BTD = self.layers[index](pair.teacher_layer, index, teacher_BTD, stream)
        # Keys and values that layers below have shared are the same for both streams.
        ours = stream.fork(below=True)
        student_BTD = teacher_BTD
        distances: dict[str, Tensor] = {}
        for index in range(first, len(model.layers)):
            teacher_BTD, student_BTD, distances[f"hidden/{index}"] = self.layers[index](
                self._both, index, teacher_BTD, student_BTD, stream, ours
            )
        with torch.no_grad():
            teacher_BTD = model.norm(teacher_BTD)
        divergence = softcapped_divergence(
            model.norm(student_BTD).flatten(0, 1),
            teacher_BTD.flatten(0, 1),
            pair.student.lm_head.weight,
            pair.student.config.final_logit_softcapping,
            temperature=self.temperature,
            allowed_V=self.allowed_V,
            chunk=self.chunk,
            top_k=self.top_k,
            block=self.block,
        )
        hidden = torch.stack(list(distances.values())).mean()
        parts = {"kl": divergence.kl, "hidden": hidden, "agreement": divergence.agreement, **distances}
        return divergence.kl + self.alignment_weight * hidden, parts

    def _both(
        self, index: int, teacher_BTD: Tensor, student_BTD: Tensor, stream: Stream, ours: Stream
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A layer of both streams, and their distance after it."""
        teacher_BTD = self.pair.teacher_layer(index, teacher_BTD, stream)
        recompute = index < self.recomputed
        student_BTD = run_layer(self.student.model, index, student_BTD, ours, recompute)
        return teacher_BTD, student_BTD, relative_distance(student_BTD, teacher_BTD, stream.span.part)


class MatchTask(LossTask):
    """`Matching` as the training loop wants it."""

    def __init__(self, module: Matching, graph: bool = False) -> None:
        """`graph`: on a GPU, record loss and gradients once and replay them.

        Raises:
            ValueError: `graph` on a GPU for a recurrence in more than half precision, or for rows in parts.
        """
        super().__init__(module)
        if graph and module.pair.part is not None:
            raise ValueError("graph: true for rows in parts, which wait for each other; give no graph")
        on_gpu = next(iter(module.pair.trained.values())).is_cuda
        if graph and on_gpu:
            check_recordable(module.pair.student)
        if graph and not on_gpu:
            logger.info("graph: without effect off the GPU")
        self.graphed = Graphed(module, list(module.pair.trained.values())) if graph and on_gpu else None

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        loss, parts = self.module(*self.inputs(batch))
        return loss, {name: value.detach() for name, value in parts.items()}

    def differentiate(self, batch: Batch, share: float) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Add `share` times the gradient of the batch's loss to the parameters' gradients; what `loss` returns."""
        if self.graphed is not None:
            ids_BT, positions_BT, rows = self.inputs(batch)
            return self.graphed(ids_BT, positions_BT, share, rows)
        return super().differentiate(batch, share)


def check_recordable(student: HybridForCausalLM) -> None:
    """Raise a ValueError unless nothing in the student's step waits for the device. In more than half precision WKV-7
    does: its PyTorch form looks at its decays first."""
    recurs = any("rwkv7" in slot.mixers for slot in student.config.slot_list())
    if recurs and student.dtype.itemsize > 2:
        raise ValueError(
            f"graph: true for a student in {student.dtype}, whose recurrence cannot be recorded; store the teacher in "
            "bfloat16, or set graph to false"
        )
