"""Stage 1: every converted slot learns what the teacher's attention says, from what the teacher's attention sees.

For slot l:  L_l = |n_l(y_S) - n_l(y_T)|^2 / |n_l(y_T)|^2,  summed over all tokens above and below the line;  L = mean
over slots. n_l is the layer's post-norm (frozen, scale-free) in families that have one between attention and residual
stream, Gemma's; in the others it is the identity, and the loss is that of the bare outputs,
|y_S - y_T|^2 / |y_T|^2: either way of what the residual stream receives. The teacher runs once for all slots, and each
slot reads the teacher's own stream, so slots depend on each other only where they share keys and values.
Legend: B batch, T time, D model width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trihybrid.data.packing import Batch
from trihybrid.distill.pair import Pair


class Alignment(nn.Module):
    """One outer forward that runs the teacher's stream and returns the losses of all converted slots.

    Raises:
        ValueError: no slot holds mixers of ours: a full layer that became a sliding one has nothing to align.
    """

    def __init__(self, pair: Pair, checkpointing: bool = False) -> None:
        super().__init__()
        if not pair.converted:
            raise ValueError(
                "stage align: no slot holds rwkv7 or tica; leave the stage out, or convert a layer"
            )
        self.pair, self.checkpointing = pair, checkpointing

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over slots and the loss of each, for int64 tokens and positions [B, T]."""
        hidden_BTD, stream = self.pair.prepare(input_ids, position_ids)
        ours = stream.fork()
        losses: dict[str, Tensor] = {}
        model = self.pair.student.model
        for index in range(max(self.pair.converted) + 1):
            record: dict[str, Tensor] | None = {} if index in self.pair.converted else None
            hidden_BTD = self.pair.teacher_layer(index, hidden_BTD, stream, record)
            if record is not None:
                mix = model.layers[index].self_attn.mix
                arguments = (record["input"], ours.span, ours.shared, None)
                y_BTD = (
                    checkpoint(mix, *arguments, use_reentrant=False)
                    if self.checkpointing
                    else mix(*arguments)
                )
                losses[f"alignment/{index}"] = relative_distance(
                    model.received(index, y_BTD), model.received(index, record["output"])
                )
        return torch.stack(list(losses.values())).mean(), losses


class AlignTask:
    """`Alignment` as the training loop wants it."""

    def __init__(self, pair: Pair, checkpointing: bool = False) -> None:
        self.pair, self.module = pair, Alignment(pair, checkpointing)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.pair.trained

    def roles(self) -> dict[str, str]:
        return self.pair.roles()

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        loss, losses = self.module(batch.inputs, batch.positions)
        return loss, {name: value.detach() for name, value in losses.items()}

    def tokens(self, batch: Batch) -> int:
        return batch.inputs.numel()


def relative_distance(x: Tensor, target: Tensor) -> Tensor:
    """|x - target|^2 / |target|^2 over all elements, in float32 or wider; a scalar, 0 where they are equal."""
    wide, aim = (t if t.dtype == torch.float64 else t.float() for t in (x, target.detach()))
    return (wide - aim).pow(2).sum() / aim.pow(2).sum().clamp(min=torch.finfo(aim.dtype).tiny)
