"""Which of a student's parameters train, with float32 master weights, and what each is for."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from trihybrid.mixers.contract import HeadNorm, Mixer, Projection
from trihybrid.models.decoder.language_model import HybridForCausalLM


def select(student: HybridForCausalLM, train: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let those parameters train whose names match a pattern (with *), in float32 at least, and no others.

    Raises:
        ValueError: patterns that match nothing; parts that may not train, or not in this dtype.
    """
    chosen = {}
    for name, parameter in list(student.named_parameters()):
        trains = any(fnmatchcase(name, pattern) for pattern in train)
        parameter.requires_grad_(trains)
        if not trains:
            continue
        if not name.startswith("model.layers."):
            raise ValueError(
                f"train: {list(train)} matches {name}; only layers may train, teacher and student share the rest"
            )
        # A master weight: small updates vanish in bfloat16; the mixers cast it where they use it.
        narrow = parameter.dtype not in (torch.float32, torch.float64)
        if not _cast_in_forward(student, name) and narrow:
            raise ValueError(
                f"train: {list(train)} matches {name}, which has no float32 master weight in a {parameter.dtype} "
                "model; leave experts and routers out, or load the models in float32"
            )
        if narrow:
            parameter.data = parameter.data.float()
        chosen[name] = parameter
    if not chosen:
        raise ValueError(f"train: {list(train)} matches no parameter of the student")
    return chosen


def roles_of(student: HybridForCausalLM, trained: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Role of every trained parameter; what is not in a mixer of ours is a matrix or a vector by its shape."""
    roles: dict[str, str] = {}
    for prefix, module in student.named_modules():
        if isinstance(module, Mixer):
            roles |= {f"{prefix}.{name}": role for name, role in module.roles().items()}
    return {name: roles.get(name, "matrix" if p.dim() == 2 else "vector") for name, p in trained.items()}


def set_parameters(student: HybridForCausalLM, tensors: Mapping[str, Tensor]) -> None:
    """Give a student these parameters, in their own dtypes."""
    for name, tensor in tensors.items():
        student.get_parameter(name).data = tensor


def _cast_in_forward(student: nn.Module, name: str) -> bool:
    """Let transformers' own projection or norm that holds the parameter `name` cast its master weight, as our mixers
    do; whether what holds it does."""
    path = name.rpartition(".")[0]
    module = student.get_submodule(path)
    if type(module) is nn.Linear:
        with torch.device("meta"):
            casting = Projection(module.in_features, module.out_features, bias=module.bias is not None)
        casting.weight, casting.bias = module.weight, module.bias
        owner, _, leaf = path.rpartition(".")
        setattr(student.get_submodule(owner), leaf, casting)
        return True
    if type(module).__name__.endswith("RMSNorm"):
        # Llama's norms answer in the dtype of their weight, Gemma's in that of their input.
        if _in_the_inputs_dtype not in module._forward_hooks.values():
            module.register_forward_hook(_in_the_inputs_dtype)
        return True
    return isinstance(module, Mixer | Projection | HeadNorm)


def _in_the_inputs_dtype(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(arguments[0].dtype)
