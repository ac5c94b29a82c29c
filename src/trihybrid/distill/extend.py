"""Stage 3: the student learns longer rows from the text itself, without its teacher.

    L = - mean over tokens of log p_S(next token),     p_S = softmax of the softcapped logits

The other way, the KL of stage 2 on longer rows, is `Matching` with an alignment weight of 0.
Legend: B batch, T time, D model width, V vocabulary, N = B T.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from trihybrid.data.packing import IGNORED, Batch
from trihybrid.distill.fuse import fuse
from trihybrid.distill.host_table import prepare
from trihybrid.distill.recompute import run_layer
from trihybrid.distill.task import LossTask
from trihybrid.distill.together import Together
from trihybrid.distill.trained import select
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.decoder.sliding import linear_sliding
from trihybrid.ops.divergence import VOCABULARY_BLOCK, softcapped_cross_entropy
from trihybrid.ops.part import Part


class Extension(nn.Module):
    """The student's cross-entropy.

    Args:
        student: what is trained.
        train: patterns (with *) of the names of parameters that train; all others are frozen.
        chunk, block: tokens, and words of the vocabulary, whose logits exist at once.
        checkpointing: recompute layers in the backward pass.
        kept_layers: with checkpointing, that many layers at the top keep what they computed.
        part: which part of its rows this process has, where several share them.

    Raises:
        ValueError: patterns that match nothing; parts that may not train, or not in this dtype.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        train: Sequence[str],
        chunk: int = 1024,
        block: int = VOCABULARY_BLOCK,
        checkpointing: bool = True,
        kept_layers: int = 0,
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.part = part
        fuse(student, student)
        linear_sliding(student)
        self.student, self.chunk, self.block = student, chunk, block
        self.trained = select(student, train)
        self.recomputed = len(student.model.layers) - kept_layers if checkpointing else 0
        self.layers = nn.ModuleList(map(Together, student.model.layers))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets_BT: Tensor,
        rows: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats for int64 tokens and positions [B, T] and their next tokens, -100 where none is
        to be predicted, and rows of tables that are on the host; of a part without targets, 0."""
        model = self.student.model
        hidden_BTD, stream = prepare(model, input_ids, position_ids, rows, part=self.part)
        for index, layer in enumerate(self.layers):
            hidden_BTD = layer(run_layer, model, index, hidden_BTD, stream, index < self.recomputed)
        # Gathered by all workers where it is shared out, so by this one in any case.
        head_VD = self.student.lm_head.weight
        if self.part is not None and not bool((targets_BT != IGNORED).any()):
            # The other parts wait for the backward pass of this one.
            return 0.0 * hidden_BTD.sum()
        return softcapped_cross_entropy(
            model.norm(hidden_BTD).flatten(0, 1),
            head_VD,
            targets_BT.flatten(),
            self.student.config.final_logit_softcapping,
            chunk=self.chunk,
            block=self.block,
        )


class ExtendTask(LossTask):
    """`Extension` as the training loop wants it."""

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        ids_BT, positions_BT, rows = self.inputs(batch)
        return self.module(ids_BT, positions_BT, batch.targets, rows), {}

    def weight(self, batch: Batch) -> float:
        """The number of its targets: rows with more documents have fewer."""
        return float((batch.targets != IGNORED).sum())
