"""What enters the layers: embeddings, and Gemma 4's per-layer inputs of the layers that run.

    p_l = (n(W_l e * D^-1/2) + E_l[id] * sqrt(P)) / sqrt(2)      e the embedding; one slice a layer

Legend: B batch, T tokens, D model width, L layers, P width of the per-layer input.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from trihybrid.infer.network.parts import Norm


class PerLayerInputs:
    """Gemma 4's per-layer inputs.

    Args:
        decoder: transformers' text model.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._width: int = decoder.hidden_size_per_layer_input
        self._norm = Norm(decoder.per_layer_projection_norm, plus_one=False)

    def __call__(self, ids_BT: Tensor, x_BTD: Tensor, count: int) -> list[Tensor]:
        """Inputs [B, T, P] of the first `count` layers, from ids and their embeddings."""
        context_BTC = linear(x_BTD, self.projection[: count * self._width])
        return list(self.combined(ids_BT, context_BTC, count).unbind(2))

    @property
    def projection(self) -> Tensor:
        """W of all layers, [L P, D]."""
        return self._decoder.per_layer_model_projection.weight

    def combined(self, ids_BT: Tensor, context_BTC: Tensor, count: int) -> Tensor:
        """Inputs [B, T, L, P] of the first `count` layers, from ids and W e of these layers."""
        decoder, shape = self._decoder, (count, self._width)
        table = decoder.embed_tokens_per_layer
        rows_BTC = table.weight[:, : count * self._width][ids_BT] * table.embed_scale.to(context_BTC.dtype)
        context_BTLP = (context_BTC * decoder.per_layer_model_projection_scale).unflatten(-1, shape)
        return (self._norm(context_BTLP) + rows_BTC.unflatten(-1, shape)) * decoder.per_layer_input_scale
