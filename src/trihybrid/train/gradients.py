"""Gradients after the backward pass: their norms, clipping and the search for what is not finite; and numbers that
come from a GPU without stopping it.

Legend: P parameters.
"""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trihybrid.train.distributed import ALONE, Workers

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class GradientNorms:
    """The 2-norms of the gradients as they are now, left on their device.

    Args:
        parameters: name -> parameter; those without a gradient are passed over.
        workers: those who hold rows of every parameter each; a worker with whole ones counts them alone.

    Attributes:
        names: the parameters that have a gradient.
        each_P: the norm of each of their gradients.
        total: the norm of all together, a scalar.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], workers: Workers = ALONE) -> None:
        self._parameters = list(parameters.values())
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        self.names = list(gradients)
        if gradients:
            norms = torch._foreach_norm(list(gradients.values()))
            self.each_P = torch.stack([norm.to(norms[0].device) for norm in norms])
            if workers.count > 1:
                square_P = self.each_P.double().square()
                workers.average([square_P])
                self.each_P = (square_P * workers.count).sqrt().to(self.each_P.dtype)
        else:
            self.each_P = torch.zeros(0)
        self.total = torch.linalg.vector_norm(self.each_P)

    def clip(self, limit: float | None) -> None:
        """Scale all gradients by min(1, limit / (total + 1e-6)); None leaves them alone."""
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, self.total)


class Readback:
    """Numbers on their way to the CPU. Those of a GPU are copied as soon as they are there, while the GPU goes on with
    what it was given next, and waited for when they are read.

    Args:
        numbers: name -> number, or tensor of any shape.
    """

    def __init__(self, numbers: Mapping[str, Tensor | float]) -> None:
        self._here: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._coming: Tensor | None = None
        away = []
        for name, number in numbers.items():
            if isinstance(number, Tensor) and number.is_cuda:
                self._shapes[name] = number.shape
                away.append(number.detach().reshape(-1).double())
            else:
                here = (
                    number.detach()
                    if isinstance(number, Tensor)
                    else torch.tensor(number, dtype=torch.float64)
                )
                self._here[name] = here.double().cpu()
        if away:
            # Asked for without blocking, torch takes pinned memory for it.
            self._coming = torch.cat(away).to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> dict[str, Tensor]:
        """The numbers, float64 on the CPU, in the shapes they had."""
        if self._coming is not None:
            self._arrived.synchronize()
            pieces = self._coming.split([shape.numel() for shape in self._shapes.values()])
            named = zip(self._shapes.items(), pieces, strict=True)
            self._here |= {name: piece.reshape(shape) for (name, shape), piece in named}
            self._coming = None
        return self._here


def check_finite(step: int, loss: float, norm: float, names: Iterable[str], each_P: Tensor) -> None:
    """See that a step's loss and gradients are numbers.

    Args:
        step: of these.
        loss: the loss before its update.
        norm: the global gradient norm.
        names, each_P: the parameters with a gradient, and the norms of these.

    Raises:
        FloatingPointError: loss or norm are not finite; names the step and the parameters to blame.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    blamed = [name for name, value in zip(names, each_P.tolist(), strict=True) if not math.isfinite(value)]
    raise FloatingPointError(
        f"step {step}: loss {loss}, gradient norm {norm}; "
        f"gradients that are not finite: {some_names(blamed)}; "
        "lower the learning rate or look at this step's batch, and resume from the last checkpoint"
    )


def layer_norms(names: Iterable[str], each_P: Tensor) -> dict[str, float]:
    """The norm of the gradient of each numbered layer, by the number behind "layers." in its parameters' names.

    Args:
        names, each_P: the parameters with a gradient, and the norms of these, on the CPU.
    """
    squares: dict[int, float] = {}
    for name, norm in zip(names, each_P.tolist(), strict=True):
        match = _LAYER.search(name)
        if match:
            layer = int(match[1])
            squares[layer] = squares.get(layer, 0.0) + norm**2
    return {f"gradient/{layer}": math.sqrt(square) for layer, square in sorted(squares.items())}


def some_names(names: Iterable[str]) -> str:
    """The first eight names, and how many more there are."""
    listed = list(names)
    shown = ", ".join(listed[:8]) or "none"
    return shown if len(listed) <= 8 else f"{shown} and {len(listed) - 8} more"
