"""A retained slot: the teacher's attention over a ring or pages.

    q = rotary(norm(W_q x))   k = rotary(norm(W_k x))   v = norm(W_v x)   y = W_o softmax(scale q k^T) v

with the norms, biases and the scale of the family (`models.anatomy`). Legend: B batch, T tokens, D model width, G
key/value heads, N head width.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trihybrid.infer.network.parts import Joined, Norm, Rotary, Table
from trihybrid.infer.network.places import Place
from trihybrid.infer.states import Stored
from trihybrid.models.anatomy import Anatomy, Attention


@dataclass(frozen=True)
class Store:
    """Where keys and values lie.

    Attributes:
        stored: those of the owner.
        ring: whether they are a window's.
        own: whether this layer puts its own there, or reads what another one put.
    """

    stored: Stored
    ring: bool
    own: bool


class RetainedAttention:
    """The attention of one layer.

    Args:
        module: transformers' attention.
        sizes, body: of the layer and the whole, from the anatomy.
        store: its keys and values.
        rotary: its rotation; None for attention without positions.

    Attributes:
        module, store, rotary: as given.
        layer_type, width, scale: transformers' name of its kind, N, and the factor on scores.
        inputs: the projections that it has, as one.
        q_norm, k_norm, v_norm: None where it has none.
    """

    def __init__(
        self, module: Any, sizes: Attention, body: Anatomy, store: Store, rotary: Rotary | None
    ) -> None:
        self.module, self.store, self.rotary = module, store, rotary
        self.layer_type, self.width, self.scale = sizes.layer_type, sizes.head_dim, body.score_scale
        names = ["q_proj", *(("k_proj", "v_proj") if store.own else ())]
        self.inputs = Joined(
            [getattr(module, name) for name in names if getattr(module, name, None) is not None]
        )
        plus_one = body.norm == "one_plus_weight"
        normed = body.norm != "none"
        self.q_norm = Norm(module.q_norm, plus_one) if normed else None
        self.k_norm = Norm(module.k_norm, plus_one) if normed and store.own else None
        self.v_norm = Norm(module.v_norm, plus_one) if body.value_norm and store.own else None

    def __call__(self, x_BTD: Tensor, place: Place) -> Tensor:
        parts = [part.unflatten(-1, (-1, self.width)) for part in self.inputs(x_BTD)]
        q_BTHN = self._placed(parts[0], self.q_norm, place)
        new = None
        if self.store.own:
            # Where values have no projection, the last part is that of the keys.
            v_BTGN = parts[-1]
            if self.v_norm is not None:
                v_BTGN = place.fusion.normed(v_BTGN, self.v_norm.weight, self.v_norm.epsilon)
            new = self._placed(parts[1], self.k_norm, place), v_BTGN
        attend = place.window if self.store.ring else place.whole
        return self.module.o_proj(attend(self.store.stored, q_BTHN, new, self.scale).flatten(-2))

    def _placed(self, x_BTHN: Tensor, norm: Norm | None, place: Place) -> Tensor:
        weight, epsilon = (None, 0.0) if norm is None else (norm.weight, norm.epsilon)
        return place.fusion.placed(x_BTHN, weight, epsilon, self._table(x_BTHN, place))

    def _table(self, x_BTHN: Tensor, place: Place) -> Table | None:
        if self.rotary is None:
            return None
        if self.layer_type not in place.rotary:
            table = self.rotary.table(place.span.positions_BT, x_BTHN.dtype)
            place.rotary[self.layer_type] = table
        return place.rotary[self.layer_type]
