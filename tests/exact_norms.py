"""Norms of Gemma 4 and Llama that compute in float64 what is float64.

transformers' compute in float32 always, and their noise hides what comparisons in float64 look for.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trihybrid.models.gemma4.norm import FusedRMSNorm

EPSILONS: dict[type[nn.Module], str] = {FusedRMSNorm: "eps", LlamaRMSNorm: "variance_epsilon"}


@contextmanager
def exact_norms() -> Iterator[None]:
    """While this lasts; other dtypes have transformers' norms."""
    with ExitStack() as stack:
        for kind, epsilon in EPSILONS.items():
            stack.enter_context(mock.patch.object(kind, "forward", _exact(kind.forward, epsilon)))
        yield


def _exact(
    usual: Callable[[nn.Module, Tensor], Tensor], epsilon: str
) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(norm: nn.Module, x: Tensor) -> Tensor:
        if x.dtype.itemsize < 8:
            return usual(norm, x)
        weight = norm.weight if getattr(norm, "with_scale", True) else None
        return nn.functional.rms_norm(x, x.shape[-1:], weight, getattr(norm, epsilon))

    return forward
