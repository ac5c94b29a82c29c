"""A decoder layer of any family around its attention or our mixers.

    x += n_post(mix(n_in(x)))          n_post in families that have one
    x += f(x)                          f = mlp(n(x)), behind a norm of its own in Gemma; experts beside it in Gemma 4
    x += n(W(gelu(W_g x) * p))         Gemma 4's per-layer input p, in shapes that have it
    x *= s                             Gemma 4's layer scalar

Legend: B batch, T tokens, D model width, P width of the per-layer input.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trihybrid.infer.network.parts import Joined, Norm
from trihybrid.infer.network.places import Place
from trihybrid.models.anatomy import Anatomy

Mix = Callable[[Tensor, Place], Tensor]


class Layer:
    """One layer.

    Args:
        module: transformers' decoder layer, which lends norms, MLP and what the family has beside.
        mix: what stands between its first norm and the residual stream.
        body: the family's anatomy.
        activations: type of an activation -> the first of that type, so that all layers call the same.

    Attributes:
        module, mix: as given.
        norms: all norms of the module by name.
        mixed: the one behind the mixers, or None.
        opening: gate and up of a dense MLP as one.
        per_layer: whether the layer has a per-layer input.
        scalar: [1], or None.
    """

    def __init__(self, module: Any, mix: Mix, body: Anatomy, activations: dict[type, Any]) -> None:
        self.module, self.mix = module, mix
        self.norms = {
            name: Norm(child, body.norm == "one_plus_weight")
            for name, child in module.named_children()
            if "norm" in name
        }
        self.mixed = None if body.post_norm is None else self.norms[body.post_norm]
        self._inner = "pre_feedforward_layernorm" in self.norms
        self._experts = getattr(module, "experts", None) is not None
        self.per_layer = hasattr(module, "per_layer_input_gate")
        self.scalar: Tensor | None = getattr(module, "layer_scalar", None)
        self._dense = hasattr(module.mlp, "gate_proj")
        if self._dense:
            self.opening = Joined([module.mlp.gate_proj, module.mlp.up_proj])
            act = module.mlp.act_fn
            self._activation = activations.setdefault(type(act), act)

    def __call__(self, x_BTD: Tensor, place: Place, input_BTP: Tensor | None) -> Tensor:
        y_BTD = self.mix(self._normed("input_layernorm", x_BTD, place), place)
        x_BTD = _added(x_BTD, y_BTD, self.mixed, place)
        x_BTD = self._feed_forward(x_BTD, place)
        module = self.module
        if self.per_layer:
            assert input_BTP is not None
            gate_BTP = place.fusion.gated(module.per_layer_input_gate(x_BTD), input_BTP, self._activation)
            y_BTD = module.per_layer_projection(gate_BTP)
            x_BTD = _added(x_BTD, y_BTD, self.norms["post_per_layer_input_norm"], place)
        return x_BTD if self.scalar is None else x_BTD * self.scalar

    def _feed_forward(self, x_BTD: Tensor, place: Place) -> Tensor:
        """The stream behind the MLP or the experts."""
        module, norms = self.module, self.norms
        if not self._inner:
            y_BTD = self._mlp(self._normed("post_attention_layernorm", x_BTD, place), place)
            return x_BTD + y_BTD
        y_BTD = self._mlp(self._normed("pre_feedforward_layernorm", x_BTD, place), place)
        if self._experts:
            flat_ED = x_BTD.flatten(0, 1)
            _, weights, chosen = module.router(flat_ED)
            mixed_ED = module.experts(norms["pre_feedforward_layernorm_2"](flat_ED), chosen, weights)
            y_BTD = norms["post_feedforward_layernorm_1"](y_BTD) + norms["post_feedforward_layernorm_2"](
                mixed_ED.view(x_BTD.shape)
            )
        return _added(x_BTD, y_BTD, norms["post_feedforward_layernorm"], place)

    def _mlp(self, x_BTD: Tensor, place: Place) -> Tensor:
        mlp = self.module.mlp
        if not self._dense:
            return mlp(x_BTD)
        gate, up = self.opening(x_BTD)
        return mlp.down_proj(place.fusion.gated(gate, up, self._activation))

    def _normed(self, name: str, x_BTD: Tensor, place: Place) -> Tensor:
        norm = self.norms[name]
        return place.fusion.normed(x_BTD, norm.weight, norm.epsilon)


def _added(x_BTD: Tensor, y_BTD: Tensor, norm: Norm | None, place: Place) -> Tensor:
    if norm is None:
        return x_BTD + y_BTD
    return place.fusion.added(x_BTD, y_BTD, norm.weight, norm.epsilon)
