"""A decoding step by the kernels.

    embeddings, rotations, per-layer inputs -> layers -> norm, head, softcap

The stream x passes a layer as (x, y, n, s): the branch y that was computed last, its norm and the layer's scalar are
still to be added by whoever reads x next, so that neither sum nor norm is a launch of its own. Launches a retained
layer: projections, attention, output, gate and up, down, and two of the per-layer input. A converted layer has two
more, the low ranks' way up and the recurrence.

Legend: B rows, D model width, L layers, P width of the per-layer input, V vocabulary, N head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trihybrid.infer.kernels.mixing import Turn, gain_of, mixing_of
from trihybrid.infer.kernels.refuse import ACTIVATIONS
from trihybrid.infer.network import Network
from trihybrid.infer.network.attention import RetainedAttention
from trihybrid.infer.network.layer import Layer
from trihybrid.infer.network.parts import Rotary
from trihybrid.ops.decode_product import MOST_ROWS, Before, Finish, Gain, normed_product, product


@dataclass(frozen=True)
class Stream:
    """The residual stream, and what is still to be added to it.

    Attributes:
        x_BD: the stream.
        y_BD, gain: the branch that was computed last, and its norm.
        scalar: [1], factor of their sum.
    """

    x_BD: Tensor
    y_BD: Tensor | None = None
    gain: Gain | None = None
    scalar: Tensor | None = None

    def before(self, gain: Gain | None) -> Before:
        """What the next product does first; `gain` is its own norm."""
        return Before(self.y_BD, self.gain, self.scalar, gain)


class KernelLayer:
    """One layer, as `infer.network.layer` has it.

    Args:
        layer: it; its weights are joined where one product reads them.
    """

    def __init__(self, layer: Layer) -> None:
        module: Any = layer.module
        gains = {name: gain_of(norm) for name, norm in layer.norms.items()}
        self._mixing = mixing_of(layer.mix)
        self._first, self._mixed = gains["input_layernorm"], gain_of(layer.mixed)
        # Where nothing stands behind the MLP, the norm before it goes by another name.
        self._last = gains.get("post_feedforward_layernorm")
        self._middle = gains.get("pre_feedforward_layernorm", gains["post_attention_layernorm"])
        activation = ACTIVATIONS[type(module.mlp.act_fn).__name__]
        self._opening, self._gated = layer.opening.weight, Finish("gated", activation)
        self._down: Tensor = module.mlp.down_proj.weight
        self._activation, self._scalar, self._per_layer = activation, layer.scalar, layer.per_layer
        if layer.per_layer:
            self._gate: Tensor = module.per_layer_input_gate.weight
            self._back: Tensor = module.per_layer_projection.weight
            self._end = gains["post_per_layer_input_norm"]

    @property
    def heads(self) -> int:
        """Of its attention."""
        return self._mixing.attention_heads

    def __call__(self, stream: Stream, turn: Turn, input_BP: Tensor | None) -> Stream:
        """The stream behind the layer; states move on."""
        mixing = self._mixing
        x_BD, p_BP = normed_product(stream.x_BD, mixing.weight_PD, stream.before(self._first), mixing.finish)
        stream = Stream(x_BD, mixing(p_BP, turn), self._mixed)
        x_BD, h_BI = normed_product(x_BD, self._opening, stream.before(self._middle), self._gated)
        stream = Stream(x_BD, product(h_BI, self._down), self._last, self._scalar)
        if self._per_layer:
            before, times = Before(stream.y_BD, self._last), Finish("times", self._activation, input_BP)
            x_BD, h_BP = normed_product(x_BD, self._gate, before, times)
            stream = Stream(x_BD, product(h_BP, self._back), self._end, self._scalar)
        return stream


class KernelStep:
    """`Network.decode` by the kernels, for at most `decode_product.MOST_ROWS` rows.

    Args:
        network: one of which `refusal` says nothing; its weights are joined where one product reads them.
    """

    def __init__(self, network: Network) -> None:
        self._network, self._per_layer = network, network.per_layer
        self._layers = [KernelLayer(layer) for layer in network.layers]
        self._rotary: dict[str, Rotary] = {
            layer.mix.layer_type: layer.mix.rotary
            for layer in network.layers
            if isinstance(layer.mix, RetainedAttention) and layer.mix.rotary is not None
        }
        heads = max(layer.heads for layer in self._layers)
        self._arrived = torch.zeros(MOST_ROWS * heads, dtype=torch.int32, device=network.device)
        self._final, self._head = gain_of(network.norm), network.model.lm_head.weight
        self._logits = Finish("logits", cap=network.body.softcap)
        self._begin, self._combine = self._begun, self._combined
        if network.device.type == "cuda":
            self._begin, self._combine = _compiled(self._begun), _compiled(self._combined)

    def __call__(self, ids_B: Tensor, positions_B: Tensor, table_BM: Tensor) -> Tensor:
        """As `Network.decode`: logits [B, V], float32 (float64 in a float64 model)."""
        assert len(ids_B) <= MOST_ROWS
        x_BD, rotary = self._begin(ids_B, positions_B)
        turn, stream = Turn(positions_B, table_BM, self._arrived, rotary), Stream(x_BD)
        inputs: list[Tensor] | list[None] = [None] * len(self._layers)
        if self._per_layer is not None:
            inputs = self._combine(ids_B, product(x_BD, self._per_layer.projection))
        for layer, input_BP in zip(self._layers, inputs, strict=True):
            stream = layer(stream, turn, input_BP)
        return normed_product(stream.x_BD, self._head, stream.before(self._final), self._logits)[1]

    def _begun(self, ids_B: Tensor, positions_B: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Embeddings [B, D], and of each layer type cosines and sines [B, N]."""
        x_BD = self._network.decoder.embed_tokens(ids_B[:, None])[:, 0]
        rotary = {}
        for name, own in self._rotary.items():
            cosine, sine = own.table(positions_B[:, None], torch.float32)
            rotary[name] = cosine[:, 0, 0], sine[:, 0, 0]
        return x_BD.contiguous(), rotary

    def _combined(self, ids_B: Tensor, context_BC: Tensor) -> list[Tensor]:
        """The per-layer inputs [B, P] of all layers."""
        assert self._per_layer is not None
        inputs_BTLP = self._per_layer.combined(ids_B[:, None], context_BC[:, None], len(self._layers))
        return list(inputs_BTLP[:, 0].unbind(1))


def _compiled(function: Callable) -> Any:
    """A few kernels instead of one an operator, anew for each number of rows."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False)
