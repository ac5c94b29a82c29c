"""How a decoding step runs: operator by operator, compiled, or as a CUDA graph: plain, with fused parts, of kernels.

What differs is how the tensors of a step reach `Network.decode`, or a `KernelStep` in its place. On a CPU a small
model is bound by what every operator costs beside its sums; compiled, a step is one call. Compiling takes a minute or
so for six small layers, and again when several sequences first decode together; tables of any width are one program,
and a later process finds it in torch's folder. A graph is recorded the first time that so many sequences with tables
so wide meet, a second or so; tables widen by doubling. It names the pages by their addresses, so it is recorded anew
when the store has grown.

Legend: B sequences, M pages in a table, V vocabulary.
"""

import logging
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trihybrid.infer.kernels import KernelStep, refusal
from trihybrid.infer.network import Network
from trihybrid.infer.network.parts import Fusion
from trihybrid.ops.decode_product import MOST_ROWS

logger = logging.getLogger(__name__)

COMPILING: dict[str, Any] = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "cpp_cache_precompile_headers": False,
}
"""A step as one C++ function that calls kernels. They are a source of their own: in one with it, the function, 280 KB
for six layers, is optimised like a kernel, which takes most of the time and makes nothing faster; and without the
function each kernel is a source that reads all headers. Two sources are compiled sooner than headers for them."""

Execution = Literal["eager", "graph", "compiled", "fused-graph", "kernels"]
EXECUTIONS = ("eager", "compiled", "graph", "fused-graph", "kernels")

OLDEST = 8, 0
"""Compute capability of `kernels`: what is older has no registers for several sequences."""

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`Network.decode` but for what stands between its products."""


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
        return self._network.decode(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(table(pages, self._width(positions)), device=device),
        )

    def _width(self, positions: list[int]) -> int:
        """Pages that the longest needs."""
        return max(position // self._network.states.length for position in positions) + 1


class CompiledDecoder(EagerDecoder):
    """Programs of torch.compile: one for a sequence alone, one for several.

    Args:
        network: on a CPU.
        backend: torch's name of the compiler.
    """

    def __init__(self, network: Network, backend: str = "inductor") -> None:
        super().__init__(network)
        options = COMPILING if backend == "inductor" else None
        self._decode = torch.compile(network.decode, backend=backend, fullgraph=True, options=options)
        self._known: set[tuple[int, int]] = set()

    def __call__(self, ids: list[int], positions: list[int], pages: Sequence[list[int]]) -> Tensor:
        # A width of one would be taken for a constant.
        width = max(2, self._width(positions))
        table_BM = torch.tensor(table(pages, width))
        torch._dynamo.mark_dynamic(table_BM, 1)
        key = len(ids), self._network.states.capacity
        known = key in self._known
        self._known.add(key)
        if not known:
            logger.info("a decoding step of %d sequences: compiled unless a program fits it", len(ids))
        # Once compiled, nothing of the model changes any more, and to look for it takes longer than the step.
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=known):
            return self._decode(torch.tensor(ids), torch.tensor(positions), table_BM)


class GraphDecoder:
    """One CUDA graph for each pair of a number of sequences and a width of the table.

    Args:
        network: on a CUDA device.
        decode: its step.
    """

    def __init__(self, network: Network, decode: Decode) -> None:
        self._network, self._decode = network, decode
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._capacity = 0
        self._known: list[list[int]] = []
        self._last: _Recorded | None = None

    @property
    def last_graph(self) -> torch.cuda.CUDAGraph:
        """The recording of the newest step, to be replayed where it is timed."""
        assert self._last is not None
        return self._last.graph

    def __call__(self, ids: list[int], positions: list[int], pages: Sequence[list[int]]) -> Tensor:
        states = self._network.states
        if self._capacity != states.capacity:
            self._recorded.clear()
            self._capacity = states.capacity
        needed = max(position // states.length for position in positions) + 1
        key = len(ids), 1 << (needed - 1).bit_length()
        if key not in self._recorded:
            self._recorded[key] = _Recorded(self._network, *key, self._decode)
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

    def __init__(self, network: Network, batch: int, width: int, decode: Decode) -> None:
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
                decode(ids_B, positions_B, self.table_BM)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_BV = decode(ids_B, positions_B, self.table_BM)
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
    if execution not in EXECUTIONS:
        names = f"{', '.join(EXECUTIONS[:-1])} or {EXECUTIONS[-1]}"
        raise ValueError(f'execution is "{execution}"; choose {names}')
    if network.has_experts:
        raise ValueError(
            f'execution is "{execution}"; tokens of a model with experts choose theirs, in shapes that '
            "nothing can record: choose eager"
        )
    if execution == "compiled":
        if network.device.type != "cpu":
            raise ValueError(
                f'execution is "compiled" and the model is on {network.device}; it is for a CPU: choose graph, '
                "fused-graph or kernels"
            )
        return CompiledDecoder(network)
    if network.device.type != "cuda":
        raise ValueError(
            f'execution is "{execution}" and the model is on {network.device}; CUDA graphs need a CUDA device: move '
            "the model there, or choose eager"
        )
    if execution == "kernels":
        return GraphDecoder(network, by_rows(network))
    fusion = Fusion() if execution == "graph" else Fusion.compiled()
    return GraphDecoder(network, partial(network.decode, fusion=fusion))


def by_rows(network: Network) -> Decode:
    """The kernels for as many sequences as they take, and what `fused-graph` runs for more; which is the faster one
    was measured for 1 and 8 sequences.

    Raises:
        ValueError: a model that the kernels do not take, with the reason.
    """
    reason = refusal(network)
    if network.dtype not in (torch.bfloat16, torch.float16):
        reason = f"its weights are {network.dtype}; torch.bfloat16 and torch.float16 are taken"
    if network.device.type == "cuda" and torch.cuda.get_device_capability(network.device) < OLDEST:
        reason = f"its GPU has no compute capability {'.'.join(map(str, OLDEST))}"
    if reason is not None:
        raise ValueError(
            f'execution is "kernels", which this model cannot have: {reason}; choose fused-graph'
        )
    step, fusion = KernelStep(network), Fusion.compiled()

    def decode(ids_B: Tensor, positions_B: Tensor, table_BM: Tensor) -> Tensor:
        if len(ids_B) <= MOST_ROWS:
            return step(ids_B, positions_B, table_BM)
        return network.decode(ids_B, positions_B, table_BM, fusion)

    return decode
