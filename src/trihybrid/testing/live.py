"""How much memory tensors take while something runs, on any device: counted, not measured.

Every operator that makes a tensor is seen, in forward and backward passes. What an operator uses up inside of itself is
not, nor is what was there before.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class LiveTensors:
    """Bytes of the tensors that have come into being and are still alive.

    Attributes:
        bytes: now.
        peak: the most there have been.
        largest: bytes of the largest single one.
    """

    bytes: int = 0
    peak: int = 0
    largest: int = 0
    _known: dict[int, weakref.ref] = field(default_factory=dict, repr=False)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self.bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak, self.largest = max(self.peak, self.bytes), max(self.largest, size)


class _Watch(TorchDispatchMode):
    def __init__(self, live: LiveTensors) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # Views and results in place bring no memory of their own.
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self.live._see(leaf)
        return out


@contextmanager
def live_tensors() -> Iterator[LiveTensors]:
    """Count the tensors that operators make inside of the block.

    with live_tensors() as live:
        loss(x).backward()
    print(live.peak)
    """
    live = LiveTensors()
    with _Watch(live):
        yield live


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of tensors at a time that a call makes. On CUDA as the allocator counts them, which sees the
    inside of operators too; elsewhere by `live_tensors`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with live_tensors() as live:
        function()
    return live.peak
