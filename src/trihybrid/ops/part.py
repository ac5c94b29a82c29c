"""One part of rows whose tokens lie on several processes, each with an equal and contiguous part (context parallelism).

All that a part wants of the others is asked for here. Every process of the group makes the same calls in the same
order, and so does its backward pass: autograd visits nodes from the last one made to the first, whatever lies between
them. It is enough that all run the same modules, and that each has a loss that depends on its own tokens.

Gradients are those of the sum of the processes' losses; of weights that all share they are to be summed over the group.

Legend: B batch, T tokens of a part, S tokens before it, P parts, N rows of a buffer, G key/value heads, D and V widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Part:
    """The part of this process. How it reaches the others says a class below this one (`Ranks`).

    Attributes:
        index: which one, 0 for the first tokens.
        count: how many there are.
    """

    index: int
    count: int

    def gather(self, own: Tensor) -> Tensor:
        """What all parts bring, [P, ...]; without gradient."""
        raise NotImplementedError

    def total(self, x: Tensor) -> Tensor:
        """The sum over the parts; without gradient."""
        raise NotImplementedError

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """[N, ...]: `received[p]` rows from each part p, to which this one sends `sent[p]` of its `rows`, both in the
        parts' order; without gradient."""
        raise NotImplementedError

    def take(self, every_P: Tensor) -> Tensor:
        """This part's of what `gather` gave."""
        return every_P[self.index]

    def previous(self, x_BT: Tensor, reach: int | None = None) -> Tensor:
        """[B, S, ...]: the tokens just before this part, oldest first, of a tensor [B, T, ...]. S is `reach`, or less
        where the row begins; None means all. Differentiable, once."""
        return x_BT[:, :0] if reach == 0 else _Previous.apply(x_BT, self, reach)

    def lengthened(self, k_BTGD: Tensor, v_BTGV: Tensor, reach: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S + T, G, .] with those of `previous` before them, in one exchange."""
        before = self.previous(torch.cat([k_BTGD, v_BTGV], -1), reach)
        k_BSGD, v_BSGV = before.split([k_BTGD.shape[-1], v_BTGV.shape[-1]], -1)
        return torch.cat([k_BSGD, k_BTGD], 1), torch.cat([v_BSGV, v_BTGV], 1)

    def _sent(self, source: int, length: int, reach: int | None) -> list[int]:
        """How many of its last tokens part `source` sends to each part, where parts have `length`."""
        reach = self.count * length if reach is None else reach
        # Between the end of one part and the beginning of a later one lie whole parts.
        return [
            max(0, min(length, reach - (place - source - 1) * length)) if place > source else 0
            for place in range(self.count)
        ]


class _Previous(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BT: Tensor, part: Part, reach: int | None) -> Tensor:
        length = x_BT.shape[1]
        ctx.part = part
        ctx.sent = part._sent(part.index, length, reach)
        ctx.received = [part._sent(place, length, reach)[part.index] for place in range(part.count)]
        x_TB = x_BT.transpose(0, 1)
        rows = torch.cat([x_TB[length - tokens :] for tokens in ctx.sent])
        ctx.length = length
        return part.exchange(rows, ctx.sent, ctx.received).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_BS: Tensor) -> tuple[Tensor, None, None]:
        rows = ctx.part.exchange(gradient_BS.transpose(0, 1), ctx.received, ctx.sent)
        total_TB = rows.new_zeros(ctx.length, *rows.shape[1:])
        for piece in rows.split(ctx.sent):
            total_TB[ctx.length - len(piece) :] += piece
        return total_TB.transpose(0, 1), None, None
