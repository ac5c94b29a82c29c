"""The gradient of a loss as one CUDA graph.

A small model's step is hundreds of kernels of some microseconds, and to ask for them one by one takes longer than they
do. A graph is recorded once, and then asked for at once. Everything in it stays where it was in memory: inputs are
copied in, and the gradients that come out are the same tensors in every step.
"""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_RUNS_BEFORE = 3  # so that all has been compiled and tuned when the recording begins


class GraphedGradients:
    """Adds the gradient of a loss to the parameters' gradients, by replaying a recording.

    The first call records; later ones must bring tensors of the same shapes and dtypes. What the loss reads besides its
    inputs, it reads where it was: change such tensors in place.

    Args:
        loss: tensors -> scalar; it must neither wait for the device nor depend on a Python value that changes.
        parameters: those that it depends on. Between two steps their gradients are either forgotten (None) or left
            where this object put them.
        share: what the loss is multiplied with before it is differentiated.
    """

    def __init__(
        self, loss: Callable[..., Tensor], parameters: Iterable[nn.Parameter], share: float = 1.0
    ) -> None:
        self._function, self._parameters, self._share = loss, list(parameters), share
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss of these inputs, without a graph of its own.

        Raises:
            ValueError: inputs of other shapes or dtypes than those of the first call.
        """
        if self._graph is None:
            self._record(inputs)
        described = [(tuple(x.shape), x.dtype) for x in inputs]
        recorded = [(tuple(x.shape), x.dtype) for x in self._inputs]
        if described != recorded:
            raise ValueError(
                f"inputs: {described}, but the graph was recorded for {recorded}; batches must be alike"
            )
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        self._attach()
        assert self._graph is not None
        self._graph.replay()
        return self._loss.clone()

    def _attach(self) -> None:
        """Give the parameters their gradients: zeros where these were forgotten."""
        forgotten = [
            (parameter, gradient) for parameter, gradient in self._gradients if parameter.grad is not gradient
        ]
        if forgotten:
            torch._foreach_zero_([gradient for _, gradient in forgotten])
            for parameter, gradient in forgotten:
                parameter.grad = gradient

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_RUNS_BEFORE):
                self._differentiate()
        torch.cuda.current_stream().wait_stream(aside)
        self._gradients = [
            (parameter, torch.zeros_like(parameter))
            for parameter in self._parameters
            if parameter.grad is not None
        ]
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may be making batches: what it asks the device for is not part of the recording.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = self._differentiate()
        for parameter, old in zip(self._parameters, before, strict=True):
            parameter.grad = old
        logger.info("recorded loss and gradients as a CUDA graph")

    def _differentiate(self) -> Tensor:
        loss = self._function(*self._inputs)
        (loss if self._share == 1.0 else loss * self._share).backward()
        return loss.detach()
