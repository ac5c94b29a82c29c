"""Muon with all matrices of one shape in a single Newton-Schulz iteration.

Keller Jordan, 2024: Nesterov momentum, then the nearest matrix with orthonormal rows (or columns), by five steps of
X <- a X + (b A + c A A) X with A = X X^T. torch.optim.Muon does this matrix by matrix in bfloat16, which on a CPU costs
as much as a third of a small model's step; here every shape is one batch, in float32 on a CPU and bfloat16 on a GPU.

Legend: N matrices, R rows, C columns (R <= C inside the iteration).
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters; the update is scaled by 0.2 sqrt(max(rows, columns)) to AdamW's usual rms (arXiv
    2502.16982), weight decay is decoupled.

    Args:
        params: parameter groups of 2-D tensors.
        lr: learning rate, of AdamW's size.
        weight_decay: decoupled decay, times the learning rate.
        momentum: decay rate of the momentum, in [0, 1).
        steps: Newton-Schulz steps.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        steps: int = 5,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps}
        )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        assert closure is None, "trihybrid's loop computes the loss itself"
        for group in self.param_groups:
            shapes: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for (shape, _), parameters in shapes.items():
                update_NRC = orthogonalise(
                    torch.stack(self._momenta(parameters, group["momentum"])), group["steps"]
                )
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(update_NRC.unbind()), alpha=-rate)
        return None

    def _momenta(self, parameters: list[Tensor], decay: float) -> list[Tensor]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - decay)
        return list(torch._foreach_lerp(gradients, buffers, decay))


def orthogonalise(matrix_NRC: Tensor, steps: int = 5) -> Tensor:
    """For each of N matrices, about the nearest one with singular values of one, [N, R, C] in the input's dtype: five
    steps leave the singular values of a well-conditioned matrix within about 0.7 and 1.2."""
    tall = matrix_NRC.shape[1] > matrix_NRC.shape[2]
    x_NRC = matrix_NRC.mT if tall else matrix_NRC
    if x_NRC.is_cuda:
        x_NRC = x_NRC.bfloat16()
    x_NRC = x_NRC / x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(
            x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a
        )
    return (x_NRC.mT if tall else x_NRC).to(matrix_NRC.dtype)
