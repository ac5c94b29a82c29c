"""transformers' Gemma-4 text model with its weights left where they are: a layer holds them only while it runs.

The forward pass is transformers' own, with its masks, positions and shared keys and values. One layer and the rows of
the tokens at hand are in memory at a time, so that the teacher of a surgery may lie on the disk.

Legend: B batch, T tokens, D width.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import Gemma4TextConfig
from transformers import initialization as init
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel, Gemma4TextRotaryEmbedding

from trihybrid.models.source import TensorSource


def streamed_model(base: Gemma4TextConfig, source: TensorSource, dtype: torch.dtype) -> Gemma4TextModel:
    """The text model of `base` over the tensors of `source`, in eval mode; nothing of it can be trained.

    Args:
        base: the teacher's text configuration; it is not changed.
        source: tensors by the names of `Gemma4ForCausalLM`.
        dtype: what is computed in.
    """
    base = deepcopy(base)
    with torch.device("meta"), init.no_init_weights():
        model = Gemma4TextModel(base)
    model.embed_tokens = _Rows(source, "model.embed_tokens.weight", base.hidden_size**0.5, dtype)
    device = source.read("model.norm.weight").device
    model.rotary_emb = Gemma4TextRotaryEmbedding(base).to(device)
    if base.hidden_size_per_layer_input:
        scale = base.hidden_size_per_layer_input**0.5
        model.embed_tokens_per_layer = _Rows(source, "model.embed_tokens_per_layer.weight", scale, dtype)
        for name in ("per_layer_model_projection", "per_layer_projection_norm"):
            load_module(getattr(model, name), source, f"model.{name}.", dtype)
    load_module(model.norm, source, "model.norm.", dtype)
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
    """An embedding that reads the rows of its tokens, [B, T] -> [B, T, D], times a scale."""

    def __init__(self, source: TensorSource, name: str, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self._source, self._name, self._dtype = source, name, dtype
        # A number of float32 first, as in transformers' embedding.
        self._scale = torch.tensor(scale)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        rows_ND = self._source.rows(self._name, tokens_BT.flatten())
        return rows_ND.view(*tokens_BT.shape, -1).to(self._dtype) * self._scale.to(
            rows_ND.device, self._dtype
        )
