"""transformers' model of a teacher with its weights left where they are: a layer holds them only while it runs.

The forward pass is transformers' own, with its masks, positions and shared keys and values. One layer and the rows of
the tokens at hand are in memory at a time, so that the teacher of a surgery may lie on the disk.

Legend: B batch, T tokens, D width.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trihybrid.models.inventory import empty_teacher
from trihybrid.models.shapes import TeacherConfig
from trihybrid.models.teacher.source import TensorSource


def streamed_model(base: TeacherConfig, source: TensorSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `base` without its head, over the tensors of `source`, in eval mode; nothing of it can be trained.

    Args:
        base: the teacher's text configuration; it is not changed.
        source: tensors by the names of the teacher's language model.
        dtype: what is computed in.
    """
    base = deepcopy(base)
    model = empty_teacher(base).model
    device = source.read("model.norm.weight").device
    for name, module in model.named_children():
        if isinstance(module, nn.Embedding):
            # A scale of the families that have one; all other families take rows as they are.
            scale = getattr(module, "scalar_embed_scale", None)
            setattr(model, name, _Rows(source, f"model.{name}.weight", scale, dtype))
        elif name == "rotary_emb":
            # Its frequencies follow from the configuration, and stay in float32.
            setattr(model, name, type(module)(base).to(device))
        elif module is not model.layers:
            load_module(module, source, f"model.{name}.", dtype)
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        layer.register_forward_pre_hook(
            lambda module, _, prefix=prefix: load_module(module, source, prefix, dtype)
        )
        layer.register_forward_hook(lambda module, *_: _unload(module), always_call=True)
    return model.eval()


def load_module(module: nn.Module, source: TensorSource, prefix: str, dtype: torch.dtype) -> None:
    """Give a module the tensors that `source` holds under `prefix`, in `dtype`, without a copy where that is theirs.

    Raises:
        ValueError: one is missing or has another shape.
    """
    names = set(source.names)
    tensors = {}
    for name, wanted in module.state_dict().items():
        if prefix + name not in names:
            raise ValueError(f"the teacher has no tensor {prefix + name}; fetch its folder again")
        found = source.read(prefix + name)
        if found.shape != wanted.shape:
            raise ValueError(
                f"{prefix + name} has the shape {list(found.shape)}, its configuration says {list(wanted.shape)}"
            )
        tensors[name] = found.to(dtype)
    module.load_state_dict(tensors, assign=True)


def _unload(module: nn.Module) -> None:
    module.to("meta")


class _Rows(nn.Module):
    """An embedding that reads the rows of its tokens, [B, T] -> [B, T, D], times a scale if there is one."""

    def __init__(self, source: TensorSource, name: str, scale: float | None, dtype: torch.dtype) -> None:
        super().__init__()
        self._source, self._name, self._dtype = source, name, dtype
        # A number of float32 first, as in transformers' embedding.
        self._scale = None if scale is None else torch.tensor(scale)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        rows_ND = self._source.rows(self._name, tokens_BT.flatten())
        rows_BTD = rows_ND.view(*tokens_BT.shape, -1).to(self._dtype)
        return rows_BTD if self._scale is None else rows_BTD * self._scale.to(rows_ND.device, self._dtype)
