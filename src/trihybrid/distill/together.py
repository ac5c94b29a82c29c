"""The unit in which weights of several workers come together: one layer, for both streams.

A loss carries its streams layer by layer, and calls parts of a layer too. What reads the weights of a layer runs inside
of one call of its `Together`, so that they can be gathered before it and given back behind it, in the forward pass and
in the backward pass.
"""

from collections.abc import Callable
from typing import Any

from torch import nn


class Together(nn.Module):
    """Modules whose weights are there while a function runs.

    Args:
        modules: whose weights it reads.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(modules)

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments). A tensor with a gradient that the function reads from one layer and leaves to another
        stands in the arguments and the result, or in a record that both layers hold."""
        return function(*arguments)
