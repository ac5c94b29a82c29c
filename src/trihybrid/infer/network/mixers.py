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
    """

    def __init__(
        self, rwkv7: Rwkv7 | None, matrix: Tensor | None, tica: Tica | None, store: Store | None
    ) -> None:
        self._rwkv7, self._matrix, self._tica, self._store = rwkv7, matrix, tica, store

    def __call__(self, x_BTD: Tensor, place: Place) -> Tensor:
        y_BTD = None
        if self._rwkv7 is not None:
            assert self._matrix is not None
            operands = self._rwkv7.operands(x_BTD, place.span, place.shared, place.fusion.prepared)
            o_BTHN = place.recur(self._matrix, operands, self._rwkv7.backend)
            y_BTD = self._rwkv7.output(self._rwkv7.reads(o_BTHN, operands) * operands.gate_BTC)
        if self._tica is not None:
            assert self._store is not None
            new = self._tica.keys_values(x_BTD) if self._store.own else None
            att_BTHN = place.whole(self._store.stored, self._tica.queries(x_BTD), new, self._tica.scale)
            z_BTD = self._tica.outputs(x_BTD, att_BTHN)
            y_BTD = z_BTD if y_BTD is None else y_BTD + z_BTD
        assert y_BTD is not None
        return y_BTD
