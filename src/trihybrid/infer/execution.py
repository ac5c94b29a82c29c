"""How a decoding step runs: operator by operator, or as a CUDA graph.

What differs is how the tensors of a step reach the function of `Network.decode`, and nothing else. Legend: B sequences,
M pages in a table, V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from trihybrid.infer.network import Network

Execution = Literal["eager", "graph"]


class Decoder(Protocol):
    """Lets the sequences of rows 0 to B - 1 read one token each; returns logits [B, V], valid until the next call."""

    def __call__(self, ids: list[int], positions: list[int], pages: Sequence[list[int]]) -> Tensor:
        """`ids`: the tokens; `positions`: how many each has seen; `pages`: of each, in order."""
        ...


class EagerDecoder:
    """Operator by operator, over a table as wide as the longest sequence needs."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, ids: list[int], positions: list[int], pages: Sequence[list[int]]) -> Tensor:
        device = self._network.device
        width = max(position // self._network.states.length for position in positions) + 1
        return self._network.decode(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(table(pages, width), device=device),
        )


def table(pages: Sequence[list[int]], width: int) -> list[list[int]]:
    """The first `width` pages of each sequence, page 0 behind their end."""
    return [(own + [0] * width)[:width] if len(own) < width else own[:width] for own in pages]


def make_decoder(network: Network, execution: Execution) -> Decoder:
    """The decoder of a name.

    Raises:
        ValueError: one that the device or the model cannot have.
    """
    if execution == "eager":
        return EagerDecoder(network)
    raise ValueError(f'execution is "{execution}"; choose eager')
