"""Where numbers stop being finite: the first module, in the order of the forward pass, that makes such a number.

A layer is found by running the batch once more with the parameters as they are, so it can be found only while these are
finite themselves.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def first_not_finite(module: nn.Module, forward: Callable[[], object]) -> str | None:
    """The name of the innermost submodule of `module` whose output is the first not to be finite while `forward` runs
    without gradients, with the parameters and buffers of its own that are not finite; None where all outputs are.

    Args:
        module: what `forward` runs.
        forward: runs it on the batch in question.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(submodule: nn.Module, _: Any, output: Any) -> None:
            if not found and not all(_finite(tensor) for tensor in _tensors(output)):
                broken = [key for key, tensor in _own(submodule) if not _finite(tensor)]
                found.append(f"{name} ({', '.join(broken)} not finite)" if broken else name)

        return look

    handles = [
        submodule.register_forward_hook(hook(name or type(module).__name__))
        for name, submodule in module.named_modules()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
