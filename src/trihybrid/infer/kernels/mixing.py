"""What stands between a layer's first norm and its residual stream: retained attention, or our mixers.

    p = W_in z                      all projections and the low ranks' way down, with the first norm before it
    o = attention(p), recurrence(p) each with its gate, side by side
    y = W_out o                     the sum of the mixers' outputs

Legend: B rows, D model width, P columns of the projections, C channels.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from trihybrid.infer.network.attention import RetainedAttention, Store
from trihybrid.infer.network.joining import Owned, join_inputs, join_outputs, join_ranks
from trihybrid.infer.network.layer import Mix
from trihybrid.infer.network.mixers import SlotMixers
from trihybrid.infer.network.parts import Norm
from trihybrid.mixers.contract import HeadNorm
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.tica import Tica
from trihybrid.ops import attention_step
from trihybrid.ops.attention_step import Heads
from trihybrid.ops.decode_product import Finish, Gain, product, raised
from trihybrid.ops.recurrence_step import Recurrence, recurrence_step


@dataclass
class Turn:
    """One token of each of B sequences.

    Attributes:
        positions_B: int64, how many tokens each has seen.
        table_BM: int64, its pages.
        arrived: int32 zeros for `ops.attention_step`.
        rotary: layer type -> cosines and sines [B, N].
    """

    positions_B: Tensor
    table_BM: Tensor
    arrived: Tensor
    rotary: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def store(self, store: Store) -> attention_step.Store:
        """The rows of a ring, or all pages."""
        stored, rows = store.stored, len(self.positions_B)
        if store.ring:
            return attention_step.Store(stored.keys[:rows], stored.values[:rows], self.positions_B, None)
        return attention_step.Store(stored.keys, stored.values, self.positions_B, self.table_BM)


class Mixing(Protocol):
    """The mixers of a layer.

    Attributes:
        weight_PD: W_in.
        finish: of its product.
        attention_heads: H of the attention, 0 without one.
    """

    weight_PD: Tensor
    finish: Finish
    attention_heads: int

    def __call__(self, p_BP: Tensor, turn: Turn) -> Tensor:
        """y [B, D]; states move on."""
        ...


def gain_of(norm: Norm | HeadNorm | None) -> Gain | None:
    """A norm for the operators."""
    return None if norm is None else Gain(norm.weight, norm.epsilon)


class RetainedMixing:
    """The teacher's attention."""

    def __init__(self, mix: RetainedAttention) -> None:
        module = mix.module
        self._store, self._layer_type = mix.store, mix.layer_type if mix.rotary is not None else None
        self.weight_PD, self.finish = mix.inputs.weight, Finish()
        channels, groups = module.q_proj.weight.shape[0], mix.store.stored.keys.shape[2]
        # Where values have no projection, they are the raw keys.
        values = self.weight_PD.shape[0] - groups * mix.width
        first = (0, channels, values) if mix.store.own else (0, None, None)
        self._channels, self.attention_heads = channels, channels // mix.width
        self._heads = Heads(
            self.attention_heads, groups, mix.width, mix.scale, first, gain_of(mix.q_norm), gain_of(mix.k_norm),
            None if mix.v_norm is None else mix.v_norm.epsilon,
        )  # fmt: skip
        self._weight_DC: Tensor = module.o_proj.weight

    def __call__(self, p_BP: Tensor, turn: Turn) -> Tensor:
        o_BC = p_BP.new_empty(len(p_BP), self._channels)
        table = None if self._layer_type is None else turn.rotary[self._layer_type]
        store = turn.store(self._store)
        attention_step.attention_step(p_BP, self._heads, store, table, None, o_BC, turn.arrived)
        return product(o_BC, self._weight_DC)


class ConvertedMixing:
    """RWKV-7, TICA, or both: their projections are joined, and so are their ways out."""

    def __init__(self, mix: SlotMixers) -> None:
        rwkv7, tica = mix.rwkv7, mix.tica
        self._matrix, self._store = mix.matrix, mix.store
        projections, downs, ups, outputs = [], [], [], []
        self._recurrence = self._heads = None
        self._channels = self.attention_heads = tica_channels = 0
        if rwkv7 is not None:
            self._recurrence = _recurrence(rwkv7)
            self._channels = self._recurrence.channels
            projections += [Owned(part, "weight") for part in (rwkv7.receptance, rwkv7.key, rwkv7.value)]
            downs += [Owned(rwkv7, name, low_rank=True) for name in ("a1", "w1", "g1")]
            ups += [Owned(rwkv7, name, low_rank=True) for name in ("a2", "w2", "g2")]
            outputs.append(Owned(rwkv7.output, "weight"))
        if tica is not None:
            assert mix.store is not None
            self._heads = _heads(tica, sum(one.weight.shape[0] for one in projections), mix.store.own)
            self.attention_heads = self._heads.heads
            tica_channels = self.attention_heads * self._heads.width
            own = (tica.q_proj, tica.k_proj, tica.v_proj) if mix.store.own else (tica.q_proj,)
            projections += [Owned(part, "weight") for part in own]
            downs.append(Owned(tica, "g1", low_rank=True))
            ups.append(Owned(tica, "g2", low_rank=True))
            outputs.append(Owned(tica.o_proj, "weight"))
        self._total = self._channels + tica_channels
        self._low = sum(one.weight.shape[0] for one in projections)
        # The decay's ranks alone are a tanh, the iclr's are left alone, and those of gates are a sigmoid.
        tanh = sigmoid = self._low
        if rwkv7 is not None:
            tanh += rwkv7.options.iclr_rank
            sigmoid = tanh + rwkv7.options.decay_rank
        self.weight_PD = join_outputs(projections + downs)
        self.finish = Finish("ranks", borders=(tanh, sigmoid))
        self._ups, self._weight_DC = join_ranks(ups), join_inputs(outputs)

    def __call__(self, p_BP: Tensor, turn: Turn) -> Tensor:
        raised_BC = raised(p_BP, self._low, self._ups)
        o_BC = p_BP.new_empty(len(p_BP), self._total)
        if self._recurrence is not None:
            assert self._matrix is not None
            read_BC = o_BC[:, : self._channels]
            recurrence_step(p_BP, raised_BC, self._recurrence, self._matrix[: len(p_BP)], read_BC)
        if self._heads is not None:
            assert self._store is not None
            gate_BC = raised_BC[:, raised_BC.shape[1] - (self._total - self._channels) :]
            read_BC, store = o_BC[:, self._channels :], turn.store(self._store)
            attention_step.attention_step(p_BP, self._heads, store, None, gate_BC, read_BC, turn.arrived)
        return product(o_BC, self._weight_DC)


def _recurrence(rwkv7: Rwkv7) -> Recurrence:
    options = rwkv7.options
    return Recurrence(
        options.heads, options.kv_heads, options.head_dim, rwkv7.w0, rwkv7.a0,
        gain_of(rwkv7.r_norm) if options.qk_norm else None, gain_of(rwkv7.k_norm) if options.qk_norm else None,
        options.key_scale == "decay", rwkv7.r_k if options.bonus else None,
    )  # fmt: skip


def _heads(tica: Tica, first: int, own: bool) -> Heads:
    """Heads whose queries begin at column `first`."""
    options = tica.options
    keys = first + options.heads * options.head_dim
    begins = (first, keys, keys + options.kv_heads * options.head_dim) if own else (first, None, None)
    return Heads(
        options.heads, options.kv_heads, options.head_dim, tica.scale, begins, gain_of(tica.q_norm),
        gain_of(tica.k_norm) if own else None,
    )  # fmt: skip


def mixing_of(mix: Mix) -> Mixing:
    """The kernels' form of what a layer mixes with."""
    if isinstance(mix, RetainedAttention):
        return RetainedMixing(mix)
    assert isinstance(mix, SlotMixers)
    return ConvertedMixing(mix)
