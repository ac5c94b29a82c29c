"""A converted slot: our mixers over a matrix and pages; their outputs add up."""

from torch import Tensor

from trihybrid.infer.network.attention import Store
from trihybrid.infer.network.places import Place
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.tica import Tica


class SlotMixers:
    """The mixers of one slot.

    Args:
        rwkv7, matrix: the recurrence and the store of its states [R, H, N, N]; None for a slot without.
        tica, store: the tiny attention and its keys and values; None for a slot without.

    Attributes:
        rwkv7, matrix, tica, store: as given.
    """

    def __init__(
        self, rwkv7: Rwkv7 | None, matrix: Tensor | None, tica: Tica | None, store: Store | None
    ) -> None:
        self.rwkv7, self.matrix, self.tica, self.store = rwkv7, matrix, tica, store

    def __call__(self, x_BTD: Tensor, place: Place) -> Tensor:
        y_BTD = None
        if self.rwkv7 is not None:
            assert self.matrix is not None
            y_BTD = self.rwkv7.output(place.recur(self.matrix, self.rwkv7, x_BTD))
        if self.tica is not None:
            assert self.store is not None
            new = self.tica.keys_values(x_BTD) if self.store.own else None
            att_BTHN = place.whole(self.store.stored, self.tica.queries(x_BTD), new, self.tica.scale)
            z_BTD = self.tica.outputs(x_BTD, att_BTHN)
            y_BTD = z_BTD if y_BTD is None else y_BTD + z_BTD
        assert y_BTD is not None
        return y_BTD
