"""Muon with all matrices of one shape in a single Newton-Schulz iteration.

Keller Jordan, 2024: Nesterov momentum, then the nearest matrix with orthonormal rows (or columns), by steps of
X <- a X + (b A + c A A) X with A = X X^T. torch.optim.Muon does this matrix by matrix in bfloat16, which on a CPU costs
as much as a third of a small model's step; here every shape is one batch, in float32 on a CPU and bfloat16 on a GPU.
Several workers share a batch: each iterates on its part, then all have all of it. Where they hold rows of the matrices,
they first give each other theirs, since an iteration needs whole ones.

The momentum is a sum, m <- mu m + g, and the update g + mu m, as in Keller Jordan's. torch's running mean,
m <- mu m + (1 - mu) g, is 1 - mu times that, which the iteration's normalisation takes out again, but only while mu
stays: where mu is warmed up, the mean holds on to the gradients of its smaller beginnings.

Legend: N matrices, R rows, C columns (R <= C inside the iteration).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from trihybrid.train.distributed import ALONE, Workers
from trihybrid.train.rows import Rows

Coefficients = Literal["quintic", "polar"]
Scale = Literal["rms", "shape"]

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's a, b, c, the same in every step."""

POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Polar Express (arXiv 2505.16932), a, b, c of five steps, made for an input 2% smaller than its norm allows."""

_POLAR_MARGIN = 1.02


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters; weight decay is decoupled. The update is scaled by 0.2 sqrt(max(rows, columns)) to
    AdamW's usual rms (arXiv 2502.16982), or by Keller Jordan's sqrt(max(1, rows / columns)).

    Args:
        params: parameter groups of 2-D tensors.
        lr: learning rate; with the scale "rms", of AdamW's size.
        weight_decay: decoupled decay, times the learning rate.
        momentum: decay rate of the momentum, in [0, 1).
        steps: Newton-Schulz steps, 5 at most with "polar".
        coefficients: "quintic" or "polar", see `orthogonalise`.
        scale: "rms" or "shape".
        normalise_rows: divide each row of the update by its norm before the iteration (MuonEq-R, arXiv 2603.28254).
        compile: torch.compile the iteration; once for each shape, at its first step.
        workers: those who share the iterations; all must hold the same parameters, gradients and state, or
        rows: the rows of each parameter that this one holds.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        steps: int = 5,
        coefficients: Coefficients = "quintic",
        scale: Scale = "rms",
        normalise_rows: bool = False,
        compile: bool = False,
        workers: Workers = ALONE,
        rows: Mapping[Tensor, Rows] | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps}
        )
        self._coefficients, self._scale, self._normalise_rows = coefficients, scale, normalise_rows
        self._orthogonalise = torch.compile(orthogonalise, dynamic=False) if compile else orthogonalise
        self._workers, self._rows = workers, rows or {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        assert closure is None, "trihybrid's loop computes the loss itself"
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.device, Rows | None], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows = self._rows.get(parameter)
                    alike.setdefault((parameter.shape, parameter.device, rows), []).append(parameter)
            for (_, _, rows), parameters in alike.items():
                update_NRC = torch.stack(self._momenta(parameters, group["momentum"]))
                if rows is not None:
                    update_NRC = torch.stack(rows.join(update_NRC.unbind(), self._workers))
                rate = group["lr"] * update_scale(update_NRC.shape[1:], self._scale)
                update_NRC = self._direction(update_NRC, group["steps"])
                if rows is not None:
                    update_NRC = update_NRC[:, rows.start : rows.end]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(update_NRC.unbind()), alpha=-rate)
        return None

    def _momenta(self, parameters: list[Tensor], decay: float) -> list[Tensor]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, decay)
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=decay))

    def _direction(self, matrix_NRC: Tensor, steps: int) -> Tensor:
        """The orthogonalised batch; among several workers each works on its part of it."""
        count, dtype = matrix_NRC.shape[0], matrix_NRC.dtype
        workers = self._workers
        if workers.count > 1:
            share = -(-count // workers.count)
            # The last parts may be short or empty: matrices of zeros, which stay zeros, fill them up.
            own_NRC = matrix_NRC.new_zeros(share, *matrix_NRC.shape[1:])
            part_NRC = matrix_NRC[workers.rank * share : (workers.rank + 1) * share]
            own_NRC[: part_NRC.shape[0]] = part_NRC
            matrix_NRC = own_NRC
        if self._normalise_rows:
            matrix_NRC = matrix_NRC / matrix_NRC.norm(dim=2, keepdim=True).clamp(min=1e-7)
        matrix_NRC = self._orthogonalise(matrix_NRC, steps, self._coefficients)
        return workers.gather(matrix_NRC)[:count].to(dtype)


def update_scale(shape: torch.Size, scale: Scale) -> float:
    """The factor of an orthogonal update of this shape [R, C] beside the learning rate: 0.2 sqrt(max(R, C)) for "rms",
    sqrt(max(1, R / C)) for "shape".
    """
    rows, columns = shape
    return 0.2 * max(rows, columns) ** 0.5 if scale == "rms" else max(1.0, rows / columns) ** 0.5


def orthogonalise(matrix_NRC: Tensor, steps: int = 5, coefficients: Coefficients = "quintic") -> Tensor:
    """For each of N matrices, about the nearest one with singular values of one: [N, R, C], bfloat16 on a GPU and in
    the input's dtype on a CPU.

    Five "quintic" steps leave the singular values of a well-conditioned matrix within about 0.7 and 1.2; five "polar"
    steps bring all that are above a thousandth of the norm within 0.16 of one.
    """
    tall = matrix_NRC.shape[1] > matrix_NRC.shape[2]
    x_NRC = matrix_NRC.mT if tall else matrix_NRC
    if x_NRC.is_cuda:
        x_NRC = x_NRC.bfloat16()
    margin = _POLAR_MARGIN if coefficients == "polar" else 1.0
    x_NRC = x_NRC / (x_NRC.norm(dim=(1, 2), keepdim=True) * margin).clamp(min=1e-7)
    for a, b, c in POLAR[:steps] if coefficients == "polar" else (QUINTIC,) * steps:
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(
            x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a
        )
    return x_NRC.mT if tall else x_NRC
