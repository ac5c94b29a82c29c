"""Weights that one product reads lie in one tensor; the parameters become views of it, so that nothing is held twice.

Legend: O outputs, I inputs, R rank, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Owned:
    """A weight by its owner.

    Attributes:
        module, name: the parameter is this attribute of this module.
        low_rank: whether it lies as [inputs, outputs], as the mixers' low-rank matrices do.
    """

    module: nn.Module
    name: str
    low_rank: bool = False

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs]."""
        own = getattr(self.module, self.name).detach()
        return own.t() if self.low_rank else own

    def take(self, view_OI: Tensor) -> None:
        """Let the parameter be this view, with the same numbers in it."""
        view = view_OI.t() if self.low_rank else view_OI
        setattr(self.module, self.name, nn.Parameter(view, requires_grad=False))


def join_outputs(owned: Sequence[Owned]) -> Tensor:
    """Maps of one input, one above the other: [sum O, I]."""
    joined = torch.cat([one.weight for one in owned])
    for one, part in zip(owned, joined.split([one.weight.shape[0] for one in owned]), strict=True):
        one.take(part)
    return joined


def join_inputs(owned: Sequence[Owned]) -> Tensor:
    """Maps whose outputs add up, side by side: [O, sum I]."""
    joined = torch.cat([one.weight for one in owned], 1)
    for one, part in zip(owned, joined.split([one.weight.shape[1] for one in owned], 1), strict=True):
        one.take(part)
    return joined


def join_ranks(owned: Sequence[Owned]) -> list[Tensor]:
    """Low-rank matrices [R, C], one behind the other in one tensor."""
    shapes = [one.weight.t().shape for one in owned]
    flat = torch.cat([one.weight.t().flatten() for one in owned])
    parts = [
        part.view(shape)
        for part, shape in zip(flat.split([shape.numel() for shape in shapes]), shapes, strict=True)
    ]
    for one, part in zip(owned, parts, strict=True):
        one.take(part.t())
    return parts
