"""Weight-only quantisation of an engine's linear maps, through torchao.

    int8    W ~ s q, q in -127 to 127, one scale s a row
    int4    W ~ s (q - 8) + z, q in 0 to 15, one pair (s, z) for 32 numbers of a row

Quantised are the linear maps of the layers: attention, MLPs, projections of our mixers, per-layer inputs. Embeddings,
heads, norms, routers, experts and the mixers' low-rank matrices and vectors stay. Activations, keys, values and
recurrences keep their dtypes. It saves memory; what it costs in quality is the user's to measure (`trihybrid eval`).
"""

import logging
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from trihybrid.mixers.contract import Projection

logger = logging.getLogger(__name__)

Weights = Literal["full", "int8", "int4"]
GROUP = 32
"""Numbers of a row that share a scale in int4: the smallest that torchao's kernels take."""
ROWS = 16
"""Of which a multiple is packed in int4 on a CPU."""


def quantise(layers: nn.ModuleList, weights: Weights) -> None:
    """Replace the weights of the linear maps in these layers; the modules stay what they are.

    Args:
        layers: decoder layers, on their device, in their dtype; nobody trains them any more.
        weights: `full` leaves them. Maps that do not divide into groups stay, and the log says how many.

    Raises:
        ValueError: a name that is not there, torchao that is missing, or int4 on a GPU in another dtype than bfloat16.
    """
    if weights == "full":
        return
    if weights not in ("int8", "int4"):
        raise ValueError(f'weights is "{weights}"; choose full, int8 or int4')
    if find_spec("torchao") is None:
        raise ValueError(f"weights is \"{weights}\", which needs torchao: pip install 'trihybrid[quantize]'")
    _unfold(layers)
    maps = {
        name: module
        for name, module in layers.named_modules()
        if type(module) is nn.Linear and "router" not in name
    }
    chosen = {id(module) for module in maps.values() if weights == "int8" or _divides(module)}
    from torchao.quantization import quantize_

    quantize_(layers, _config(weights, layers), lambda module, name: id(module) in chosen)
    if len(chosen) < len(maps):
        logger.warning(
            "%s: %d of %d linear maps stay as they are; inputs are a multiple of %d and outputs of %d in the others",
            weights, len(maps) - len(chosen), len(maps), GROUP, ROWS,
        )  # fmt: skip
    logger.info("%s: %d linear maps quantised", weights, len(chosen))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of a quantised one those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _unfold(layers: nn.ModuleList) -> None:
    """Put plain linear maps in the place of our mixers' projections, whose weight is a product of two parameters."""
    for parent in list(layers.modules()):
        for name, module in parent.named_children():
            if isinstance(module, Projection):
                plain = nn.Linear(module.in_features, module.out_features, device="meta")
                plain.weight = nn.Parameter(module.matrix(module.weight.dtype), requires_grad=False)
                plain.bias = module.bias
                setattr(parent, name, plain)


def _divides(module: nn.Linear) -> bool:
    return module.in_features % GROUP == 0 and module.out_features % ROWS == 0


def _config(weights: Weights, layers: nn.ModuleList) -> Any:
    """Torchao's. Its formats of int4 are those of a device, and the CPU's is among its prototypes."""
    first = next(layers.parameters())
    if weights == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig(set_inductor_config=False)
    if first.device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    if first.dtype != torch.bfloat16:
        raise ValueError(
            f'weights is "int4" and the model {first.dtype}; on a GPU torchao packs bfloat16: cast it'
        )
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(
        group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
