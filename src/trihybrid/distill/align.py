"""Stage 1: every converted slot learns what the teacher's attention says, from what the teacher's attention sees.

For slot l:  L_l = |n_l(y_S) - n_l(y_T)|^2 / |n_l(y_T)|^2,  summed over the tokens of a row above and below the line and
averaged over the rows;  L = mean over slots. n_l is the layer's post-norm (frozen, scale-free) in families that have
one between attention and residual stream, Gemma's; in the others it is the identity, and the loss is that of the bare
outputs, |y_S - y_T|^2 / |y_T|^2: either way of what the residual stream receives. The teacher runs once for all slots,
and each slot reads the teacher's own stream, so slots depend on each other only where they share keys and values.
Legend: B batch, T time, D model width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trihybrid.data.packing import Batch
from trihybrid.distill.pair import Pair
from trihybrid.distill.task import LossTask
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.decoder.model import Stream
from trihybrid.models.pattern import Slot
from trihybrid.ops.part import Part


def check_converted(slots: Sequence[Slot]) -> None:
    """Raise ValueError where no slot holds mixers of ours, so that there is nothing to align."""
    if not any(slot.converted for slot in slots):
        raise ValueError("stage align: no slot holds rwkv7 or tica; leave the stage out, or convert a layer")


class Alignment(nn.Module):
    """One outer forward that runs the teacher's stream and returns the losses of all converted slots.

    Raises:
        ValueError: no slot holds mixers of ours: a full layer that became a sliding one has nothing to align.
    """

    def __init__(self, pair: Pair, checkpointing: bool = False) -> None:
        super().__init__()
        check_converted(pair.student.config.slot_list())
        self.pair, self.checkpointing = pair, checkpointing
        self.layers = pair.together()

    @property
    def student(self) -> HybridForCausalLM:
        """Whose mixers train."""
        return self.pair.student

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Its parameters that do."""
        return self.pair.trained

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, rows: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over slots and the loss of each, for int64 tokens and positions [B, T], and rows of tables that
        are on the host."""
        hidden_BTD, stream = self.pair.prepare(input_ids, position_ids, rows)
        ours = stream.fork()
        losses: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers[: max(self.pair.converted) + 1]):
            hidden_BTD, loss = layer(self._layer, index, hidden_BTD, stream, ours)
            if loss is not None:
                losses[f"alignment/{index}"] = loss
        return torch.stack(list(losses.values())).mean(), losses

    def _layer(
        self, index: int, hidden_BTD: Tensor, stream: Stream, ours: Stream
    ) -> tuple[Tensor, Tensor | None]:
        """The teacher's layer, and the loss of its slot if that is converted."""
        if index not in self.pair.converted:
            return self.pair.teacher_layer(index, hidden_BTD, stream), None
        record: dict[str, Tensor] = {}
        hidden_BTD = self.pair.teacher_layer(index, hidden_BTD, stream, record)
        model = self.student.model
        mix = model.layers[index].self_attn.mix
        arguments = (record["input"], ours.span, ours.shared, None)
        y_BTD = checkpoint(mix, *arguments, use_reentrant=False) if self.checkpointing else mix(*arguments)
        ours_BTD, theirs_BTD = (model.received(index, x_BTD) for x_BTD in (y_BTD, record["output"]))
        loss = relative_distance(ours_BTD, theirs_BTD, stream.span.part)
        return hidden_BTD, loss


class AlignTask(LossTask):
    """`Alignment` as the training loop wants it."""

    def __init__(self, pair: Pair, checkpointing: bool = False) -> None:
        super().__init__(Alignment(pair, checkpointing))

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        loss, losses = self.module(*self.inputs(batch))
        return loss, {name: value.detach() for name, value in losses.items()}


def relative_distance(x: Tensor, target: Tensor, part: Part | None = None) -> Tensor:
    """|x - target|^2 / |target|^2 of each row [B, ...], averaged over the rows, so that the mean over equal parts of a
    batch is that of the whole; in float32 or wider, a scalar, 0 where they are equal. No gradient goes to the target,
    and for the backward pass both wait as they are, not their difference in float32.

    Of rows in parts, x and target are those of one `part`, and what is below the line is the whole row's. The share of
    a part counts as many times as there are parts, so that the mean over the parts is the distance of the rows."""
    return _RelativeDistance.apply(x, target.detach(), part)


class _RelativeDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, target: Tensor, part: Part | None) -> Tensor:
        wide, aim = (_wide(t) for t in (x, target))
        size_B = aim.pow(2).flatten(1).sum(1)
        if part is not None:
            size_B = part.total(size_B) / part.count
        size_B = size_B.clamp(min=torch.finfo(aim.dtype).tiny)
        ctx.save_for_backward(x, target, size_B)
        return ((wide - aim).pow(2).flatten(1).sum(1) / size_B).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, target, size_B = ctx.saved_tensors
        factor_B = 2 * gradient / (len(size_B) * size_B)
        rows = factor_B.view(-1, *[1] * (x.dim() - 1))
        return ((_wide(x) - _wide(target)).mul_(rows)).to(x.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
