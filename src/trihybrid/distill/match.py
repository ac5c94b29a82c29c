"""Stage 2: the student's distribution follows the teacher's while its hidden states stay near.

    L = KL(p_T || p_S) + weight * mean over layers of |h_S - h_T|^2 / |h_T|^2

Both distributions are softcapped where the teacher's is, and plain elsewhere; the student runs on its own hidden
states, so what it gets wrong below it must bear above (cumulative alignment). Layers below the first difference are
computed once and not counted.
Legend: B batch, T time, D model width, N = B T.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trihybrid.data.packing import Batch
from trihybrid.distill.align import relative_distance
from trihybrid.distill.pair import Pair
from trihybrid.ops.divergence import softcapped_divergence


class Matching(nn.Module):
    """One outer forward that carries both streams in lockstep and returns the losses.

    Args:
        pair: teacher and student.
        temperature: of both distributions.
        alignment_weight: weight of the hidden alignment.
        allowed_V: token ids that the KL compares, or None for all.
        chunk: tokens whose logits exist at once.
        checkpointing: recompute the student's layers in the backward pass; the teacher's keep nothing anyway.
    """

    def __init__(
        self,
        pair: Pair,
        temperature: float = 1.0,
        alignment_weight: float = 0.1,
        allowed_V: Tensor | None = None,
        chunk: int = 1024,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.pair, self.temperature, self.alignment_weight = pair, temperature, alignment_weight
        self.allowed_V, self.chunk, self.checkpointing = allowed_V, chunk, checkpointing

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts (kl, hidden, agreement) for int64 tokens and positions [B, T]."""
        pair, model = self.pair, self.pair.student.model
        teacher_BTD, stream = pair.prepare(input_ids, position_ids)
        first = pair.first_difference
        for index in range(first):
            teacher_BTD = pair.teacher_layer(index, teacher_BTD, stream)
        # Keys and values that layers below have shared are the same for both streams.
        ours = stream.fork(below=True)
        student_BTD = teacher_BTD
        distances = []
        for index in range(first, len(model.layers)):
            teacher_BTD = pair.teacher_layer(index, teacher_BTD, stream)
            if self.checkpointing:
                student_BTD = checkpoint(model.layer, index, student_BTD, ours, use_reentrant=False)
            else:
                student_BTD = model.layer(index, student_BTD, ours)
            distances.append(relative_distance(student_BTD, teacher_BTD))
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
        )
        hidden = torch.stack(distances).mean()
        parts = {"kl": divergence.kl, "hidden": hidden, "agreement": divergence.agreement}
        return divergence.kl + self.alignment_weight * hidden, parts


class MatchTask:
    """`Matching` as the training loop wants it."""

    def __init__(self, module: Matching) -> None:
        self.module = module

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.module.pair.trained

    def roles(self) -> dict[str, str]:
        return self.module.pair.roles()

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        loss, parts = self.module(batch.inputs, batch.positions)
        return loss, {name: value.detach() for name, value in parts.items()}

    def tokens(self, batch: Batch) -> int:
        return batch.inputs.numel()
