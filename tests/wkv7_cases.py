"""Inputs of WKV-7 for tests of several files and processes, and all that a function of them gives."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NAMES = ["o", "final", "r", "log_w", "k", "v", "a", "b", "state"]
"""What `results` returns, in its order; from "r" on they are gradients."""

Operator = Callable[..., tuple[Tensor, Tensor]]


def make(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """r, log_w, k, v, a, b, state as RWKV-7 makes them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    unit_key = torch.nn.functional.normalize(normal(B, T, H, K), dim=-1)
    iclr = torch.sigmoid(normal(B, T, H, K))
    log_w = -0.6065 * torch.sigmoid(2 * normal(B, T, H, K))
    tensors = [
        normal(B, T, H, K),
        log_w,
        0.5 * normal(B, T, H, K),
        normal(B, T, H, V),
        -unit_key,
        unit_key * iclr,
    ]
    return [x.to(dtype) for x in [*tensors, normal(B, H, K, V)]]


def weights(shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    """The gradient of a random linear loss."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def results(
    operator: Operator, tensors: list[Tensor], dresults: tuple[Tensor | None, Tensor | None], **arguments
) -> list[Tensor | None]:
    """Outputs, final state, and the gradients for all tensors of `tensors` (without a state where there is none), given
    those of outputs and final state; None stands for a result that the loss does not depend on."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    o, final = operator(*leaves, **arguments)
    used = [(x, dx) for x, dx in zip((o, final), dresults, strict=True) if dx is not None]
    gradients = torch.autograd.grad(
        [x for x, _ in used], leaves, [dx for _, dx in used], materialize_grads=True
    )
    return [o.detach(), final.detach(), *gradients]


def two_layers(operator: Operator) -> Operator:
    """The operator over values that it has made itself, recomputed in the backward; one S_0 for both."""

    def layers(*tensors: Tensor, **arguments) -> tuple[Tensor, Tensor]:
        o, _ = operator(*tensors, **arguments)
        return operator(*tensors[:3], o.tanh(), *tensors[4:], **arguments)

    def recomputed(*tensors: Tensor, **arguments) -> tuple[Tensor, Tensor]:
        return checkpoint(layers, *tensors, use_reentrant=False, **arguments)

    return recomputed
