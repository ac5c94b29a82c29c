"""How a decoding step runs: operator by operator, or as a CUDA graph, plain or with fused parts.

What differs is how the tensors of a step reach `Network.decode`, and nothing else. A graph is recorded the first time
that so many sequences with tables so wide meet, a second or so; tables widen by doubling. It names the pages by their
addresses, so it is recorded anew when the store has grown.

Legend: B sequences, M pages in a table, V vocabulary.
"""

import logging
import operator
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from trihybrid.infer.network import Network
from trihybrid.infer.network.parts import Fusion

logger = logging.getLogger(__name__)

Execution = Literal["eager", "graph", "fused-graph"]


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


class GraphDecoder:
    """One CUDA graph for each pair of a number of sequences and a width of the table.

    Args:
        network: on a CUDA device.
        fusion: what stands between the matrix products.
    """

    def __init__(self, network: Network, fusion: Fusion) -> None:
        self._network, self._fusion = network, fusion
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._capacity = 0
        self._known: list[list[int]] = []
        self._last: _Recorded | None = None

    def __call__(self, ids: list[int], positions: list[int], pages: Sequence[list[int]]) -> Tensor:
        states = self._network.states
        if self._capacity != states.capacity:
            self._recorded.clear()
            self._capacity = states.capacity
        needed = max(position // states.length for position in positions) + 1
        key = len(ids), 1 << (needed - 1).bit_length()
        if key not in self._recorded:
            self._recorded[key] = _Recorded(self._network, *key, self._fusion)
            logger.info("recorded a decoding step of %d sequences and up to %d pages", *key)
        recorded = self._recorded[key]
        # The lists are held, so that no other can take the place of one.
        same = len(self._known) == len(pages) and all(map(operator.is_, self._known, pages))
        if not same or recorded is not self._last:
            recorded.table_BM.copy_(torch.tensor(table(pages, key[1])))
            self._known, self._last = list(pages), recorded
        recorded.tokens_2B.copy_(torch.tensor([ids, positions]))
        recorded.graph.replay()
        return recorded.logits_BV


class _Recorded:
    """A step of B sequences over tables of M pages, with the tensors that it reads and writes."""

    def __init__(self, network: Network, batch: int, width: int, fusion: Fusion) -> None:
        device = network.device
        self.tokens_2B = torch.zeros(2, batch, dtype=torch.int64, device=device)
        self.table_BM = torch.zeros(batch, width, dtype=torch.int64, device=device)
        ids_B, positions_B = self.tokens_2B.unbind()
        # Warming up writes into the states like any step, so they are put back.
        kept = [network.states.read_row(row) for row in range(batch)]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                network.decode(ids_B, positions_B, self.table_BM, fusion)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_BV = network.decode(ids_B, positions_B, self.table_BM, fusion)
        for row, tensors in enumerate(kept):
            network.states.write_row(row, tensors)


def table(pages: Sequence[list[int]], width: int) -> list[list[int]]:
    """The first `width` pages of each sequence, page 0 behind their end."""
    return [(own + [0] * width)[:width] if len(own) < width else own[:width] for own in pages]


def make_decoder(network: Network, execution: Execution) -> Decoder:
    """The decoder of a name.

    Raises:
        ValueError: one that is not there, or that the device or the model cannot have.
    """
    if execution == "eager":
        return EagerDecoder(network)
    if execution not in ("graph", "fused-graph"):
        raise ValueError(f'execution is "{execution}"; choose eager, graph or fused-graph')
    if network.device.type != "cuda":
        raise ValueError(
            f'execution is "{execution}" and the model is on {network.device}; CUDA graphs need a CUDA device: move '
            "the model there, or choose eager"
        )
    if network.has_experts:
        raise ValueError(
            f'execution is "{execution}"; tokens of a model with experts choose theirs, whose shapes no graph can '
            "record: choose eager"
        )
    return GraphDecoder(network, Fusion() if execution == "graph" else Fusion.compiled())
