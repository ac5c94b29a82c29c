"""The RWKV-7 mixer: hxa07i, with the options by which the family's other revisions differ.

Equations: the RWKV-7 paper (arXiv 2503.14456) for the recurrence; the OpenMOSE hxa07i revision for everything around
it (model card of RWKV-Gemma-4-5B-E2B-Preview-v0.1 and the 07i graph published for llama.cpp).

    r = norm(W_r x)   k = norm(W_k x)   v = W_v x              H heads of r, G of k and v, width N
    u = w0 + tanh(x w1) w2      log W = -exp(-1/2) sigmoid(u)  decay, float32, W in (0.545, 1)
    a = sigmoid(a0 + (x a1) a2)                                in-context learning rate (iclr)
    g = sigmoid(x g1) g2                                       gate
    k, v repeated to H heads (head h reads h // (H / G));  kk = k / |k|;  k <- k (1 - W + a)
    S_t = diag(W_t) S_{t-1} + (kk_t a_t) (-kk_t^T S_{t-1}) + k_t v_t^T;   o_t = S_t^T r_t / sqrt(N)
    y = W_o (o * g)

`options` has the formulas of what may come in between: positions, residuals, v-LoRA, bonus, another key scale.

Legend: B batch, T time, D model width, H heads, G key/value heads, N head width, C = H N channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trihybrid.mixers.contract import Cost, HeadNorm, Mixer, Projection, Shared, Write, low_rank
from trihybrid.mixers.rotary import rotary
from trihybrid.mixers.rwkv7.options import Rwkv7Options
from trihybrid.mixers.rwkv7.start import (
    BONUS,
    decay_start,
    iclr_start,
    residual_start,
    scaled_orthogonal,
    write_gate,
)
from trihybrid.mixers.span import Span
from trihybrid.mixers.state import RecurrentState, State
from trihybrid.ops.rates.definition import rates_reference
from trihybrid.ops.rotary.definition import rotate
from trihybrid.ops.wkv7 import wkv7
from trihybrid.ops.wkv7.grouped import wkv7_grouped
from trihybrid.ops.wkv7.parts import wkv7_parts


@dataclass(frozen=True)
class Operands:
    """What a block of tokens brings to the recurrence.

    Attributes:
        r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN: the arguments of `ops.wkv7` (its a is -kk, its b is kk a).
        gate_BTC: the output gate.
    """

    r_BTHN: Tensor
    log_w_BTHN: Tensor
    k_BTHN: Tensor
    v_BTHN: Tensor
    a_BTHN: Tensor
    b_BTHN: Tensor
    gate_BTC: Tensor

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The operator's arguments, in its order."""
        return self.r_BTHN, self.log_w_BTHN, self.k_BTHN, self.v_BTHN, self.a_BTHN, self.b_BTHN


class Rwkv7(Mixer):
    """RWKV-7 with optional keys and values of a donor slot.

    Args:
        options: sizes and what the revision does.
        index: index of the slot, under which keys and values are published.
        donor: index of an earlier rwkv7 slot whose normalised keys and values this one reads; it then has no key and
            value projections of its own.
        backend: name of the WKV-7 backend, or None for the best one of the device.
        first: index of the first rwkv7 slot, whose values or keys a residual mixes in; None in that slot itself.
            Without a residual it is not read.

    Raises:
        ValueError: a donor together with a residual.
    """

    kind = "rwkv7"
    r_norm: HeadNorm
    k_norm: HeadNorm
    w1: nn.Parameter
    w2: nn.Parameter
    a1: nn.Parameter
    a2: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    v0: nn.Parameter
    v1: nn.Parameter
    v2: nn.Parameter
    k0: nn.Parameter
    k1: nn.Parameter
    k2: nn.Parameter
    dv1: nn.Parameter
    dv2: nn.Parameter

    def __init__(
        self,
        options: Rwkv7Options,
        index: int,
        donor: int | None = None,
        backend: str | None = None,
        first: int | None = None,
    ) -> None:
        super().__init__()
        self.options, self.publishes, self.donor, self.backend = options, index, donor, backend
        if donor is not None and options.residual:
            raise ValueError(
                f"rwkv7 of slot {index} reads keys and values of slot {donor}, and value_residual_rank or "
                "key_residual_rank would change them; leave the donor or the residual away"
            )
        self.first = first if options.residual else None
        hidden, channels, kv_channels = options.hidden_size, options.channels, options.kv_channels
        biased = options.input_bias
        self.receptance = Projection(hidden, channels, bias=biased)
        if options.qk_norm:
            self.r_norm = HeadNorm(options.head_dim, options.norm_epsilon)
        if donor is None:
            self.key = Projection(hidden, kv_channels, bias=biased)
            self.value = Projection(hidden, kv_channels, bias=biased)
            if options.qk_norm:
                self.k_norm = HeadNorm(options.head_dim, options.norm_epsilon)
        self.output = Projection(channels, hidden, bias=options.output_bias)
        self.w0, self.a0 = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        read = hidden if options.lora_input == "input" else channels
        for letter, rank in (("w", options.decay_rank), ("a", options.iclr_rank), ("g", options.gate_rank)):
            self._lora(letter, read, rank, channels)
        if self.first is not None:
            ranks = {"v": options.value_residual_rank, "k": options.key_residual_rank}
            for letter, rank in ((letter, rank) for letter, rank in ranks.items() if rank):
                self.register_parameter(f"{letter}0", nn.Parameter(torch.empty(kv_channels)))
                self._lora(letter, hidden, rank, kv_channels)
        if options.value_lora_rank:
            self._lora("dv", hidden, options.value_lora_rank, channels)
        if options.bonus:
            self.r_k = nn.Parameter(torch.empty(options.heads, options.head_dim))

    def _lora(self, letters: str, inputs: int, rank: int, outputs: int) -> None:
        self.register_parameter(f"{letters}1", nn.Parameter(torch.empty(inputs, rank)))
        self.register_parameter(f"{letters}2", nn.Parameter(torch.empty(rank, outputs)))

    def forward(
        self, x_BTD: Tensor, span: Span, state: State | None, shared: Shared
    ) -> tuple[Tensor, State | None]:
        o_BTC, g_BTC, after = self.recur(x_BTD, span, state, shared)
        return self.output(o_BTC * g_BTC), after

    def recur(
        self,
        x_BTD: Tensor,
        span: Span,
        state: State | None,
        shared: Shared,
        rates: "Rates" = rates_reference,
    ) -> tuple[Tensor, Tensor, RecurrentState]:
        """The mixer up to its output projection: normalised reads o and gate g, both [B, T, C], and the state. `rates`
        may be a kernel in the place of `rates_reference`; keys that are not shared do without."""
        if state is not None and not isinstance(state, RecurrentState):
            raise ValueError(f"rwkv7 needs a RecurrentState, got {type(state).__name__}")
        before_BHNN = None if state is None else state.matrix_BHKV
        if self.options.shares_keys and span.part is None:
            tokens, g_BTC = self._grouped(x_BTD, span, shared, rates)
            o_BTHN, matrix_BHNN = wkv7_grouped(*tokens, before_BHNN, span.reset_BT, self.backend)
            return self._scaled(o_BTHN).flatten(-2).to(g_BTC.dtype), g_BTC, RecurrentState(matrix_BHNN)
        operands = self.operands(x_BTD, span, shared)
        arguments = (*operands.tokens, before_BHNN, span.reset_BT)
        if span.part is None:
            o_BTHN, matrix_BHNN = wkv7(*arguments, self.backend)
        else:
            o_BTHN, matrix_BHNN = wkv7_parts(*arguments, span.part, self.backend)
        return self.reads(o_BTHN, operands), operands.gate_BTC, RecurrentState(matrix_BHNN)

    def operands(
        self, x_BTD: Tensor, span: Span, shared: Shared, prepare: "Prepare | None" = None
    ) -> Operands:
        """All that the recurrence takes of a block of tokens; keys and values are published on the way. `prepare` may
        stand in for `prepared`, as a compiled form of it."""
        options = self.options
        heads = (options.heads, options.head_dim)
        r_BTHN, k_BTGN, v_BTGN, decay_BTC, iclr_BTC, g_BTC = self._projected(x_BTD, span, shared)
        log_w_BTHN, k_BTHN, v_BTHN, kk_BTHN, a_BTHN = (prepare or prepared)(
            decay_BTC, iclr_BTC, self.w0, self.a0, k_BTGN, v_BTGN, heads, options.key_scale == "decay"
        )
        if options.value_lora_rank:
            added_BTC = options.value_lora_factor * _wide(low_rank(x_BTD, self.dv1, self.dv2))
            v_BTHN = (v_BTHN + added_BTC.unflatten(-1, heads)).to(x_BTD.dtype)
        log_w_BTHN, k_BTHN, v_BTHN, kk_BTHN = _without_padding(span, log_w_BTHN, k_BTHN, v_BTHN, kk_BTHN)
        return Operands(r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, -kk_BTHN, kk_BTHN * a_BTHN, g_BTC)

    def _projected(
        self, x_BTD: Tensor, span: Span, shared: Shared
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """r [B, T, H, N], k and v [B, T, G, N], what is added to the offsets of decay and iclr, and the gate, each of
        these three [B, T, C]; keys and values are published on the way."""
        options = self.options
        heads = (options.heads, options.head_dim)
        r_BTHN = self._placed("r_norm", self.receptance(x_BTD).unflatten(-1, heads), span, shared)
        k_BTGN, v_BTGN = self._keys_values(x_BTD, span, shared)

        # From their pre-activations on, decay and iclr are float32: in bf16 a W near one would lose its distance from
        # one, and a float32 master weight would mean something else than the bf16 weight that it is saved as.
        z_BTD = x_BTD if options.lora_input == "input" else r_BTHN.flatten(-2).to(x_BTD.dtype)
        decay_BTC = low_rank(z_BTD, self.w1, self.w2, torch.tanh)
        iclr_BTC = low_rank(z_BTD, self.a1, self.a2)
        g_BTC = low_rank(z_BTD, self.g1, self.g2, torch.sigmoid)
        return r_BTHN, k_BTGN, v_BTGN, decay_BTC, iclr_BTC, g_BTC

    def _grouped(
        self, x_BTD: Tensor, span: Span, shared: Shared, rates: "Rates"
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
        """What `ops.wkv7.grouped` takes of a block of tokens, and the gate."""
        heads = (self.options.heads, self.options.head_dim)
        r_BTHN, k_BTGN, v_BTGN, decay_BTC, iclr_BTC, g_BTC = self._projected(x_BTD, span, shared)
        log_w_BTHN, a_BTHN = (x.unflatten(-1, heads) for x in rates(decay_BTC, iclr_BTC, self.w0, self.a0))
        tokens = _without_padding(span, log_w_BTHN, k_BTGN, v_BTGN, _unit(_wide(k_BTGN)))
        return (r_BTHN, *tokens, a_BTHN), g_BTC

    def reads(self, o_BTHN: Tensor, operands: Operands) -> Tensor:
        """What the recurrence read, [B, T, C], scaled and with the bonus of the options."""
        o_BTHN = self._scaled(o_BTHN)
        if self.options.bonus:
            own_BTH1 = (_wide(operands.r_BTHN) * operands.k_BTHN * self.r_k).sum(-1, keepdim=True)
            o_BTHN = o_BTHN + own_BTH1 * operands.v_BTHN
        return o_BTHN.flatten(-2).to(operands.gate_BTC.dtype)

    def _scaled(self, o_BTHN: Tensor) -> Tensor:
        return o_BTHN * self.options.head_dim**-0.5

    def _keys_values(self, x_BTD: Tensor, span: Span, shared: Shared) -> tuple[Tensor, Tensor]:
        if self.donor is not None:
            return shared.keys_values[self.kind, self.donor]
        options = self.options
        groups = (options.kv_heads, options.head_dim)
        k_BTGN = self._placed("k_norm", self.key(x_BTD).unflatten(-1, groups), span, shared)
        v_BTGN = self.value(x_BTD).unflatten(-1, groups)
        if self.first is not None:
            first_k_BTGN, first_v_BTGN = shared.keys_values[self.kind, self.first]
            if options.value_residual_rank:
                v_BTGN = _residual(v_BTGN, first_v_BTGN, self.v0, low_rank(x_BTD, self.v1, self.v2))
            if options.key_residual_rank:
                k_BTGN = _residual(k_BTGN, first_k_BTGN, self.k0, low_rank(x_BTD, self.k1, self.k2))
        if self.publishes is not None:
            shared.keys_values[self.kind, self.publishes] = k_BTGN, v_BTGN
        return k_BTGN, v_BTGN

    def _placed(self, norm: str, x_BTHN: Tensor, span: Span, shared: Shared) -> Tensor:
        """Heads behind their norm and their rotation, each where the options have it; rotated ones stay float32."""
        width, base = self.options.head_dim, self.options.rope_base
        if base is not None:
            x_BTHN = _wide(x_BTHN)
        if self.options.qk_norm:
            x_BTHN = getattr(self, norm)(x_BTHN)
        if base is None:
            return x_BTHN
        cosine, sine = rotary(span, shared, width, base, width, x_BTHN.dtype)
        return rotate(x_BTHN, cosine, -sine)  # transformers' rotate-half turns the other way

    def initialise(self, index: int, count: int, write: Write) -> None:
        """hxa07c's start for decay, iclr and LoRAs (the training code of the family), normal projections, and the gate
        of `options.gate`; see `start`. Depth is index / (count - 1). The LoRAs of residuals start at hxa079's zero."""
        options = self.options
        write(self.w0, decay_start(options.channels, options.head_dim, index / max(count - 1, 1)))
        write(self.a0, iclr_start(options.channels, options.head_dim))
        for name in ("w1", "w2", "a1", "a2"):
            write(getattr(self, name), scaled_orthogonal(getattr(self, name).shape))
        write_gate(self.g1, self.g2, options.gate, write)
        for name, parameter in list(self.named_parameters(recurse=False)):
            if name in ("v0", "k0"):
                write(parameter, residual_start(options.kv_channels))
            elif name in ("v1", "k1"):
                write(parameter, torch.zeros(parameter.shape))
            elif name in ("v2", "k2", "dv1", "dv2"):
                write(parameter, scaled_orthogonal(parameter.shape))
            elif name == "r_k":
                write(parameter, torch.full(parameter.shape, BONUS))
        projections = [self.receptance, self.output] + (
            [] if self.donor is not None else [self.key, self.value]
        )
        for projection in projections:
            write(projection.weight, nn.init.normal_(torch.empty(projection.weight.shape), std=0.02))
            if projection.bias is not None:
                write(projection.bias, torch.zeros(projection.bias.shape))
        norms = ["r_norm"] + ([] if self.donor is not None else ["k_norm"])
        for name in norms if options.qk_norm else []:
            write(getattr(self, name).weight, torch.ones(options.head_dim))

    def roles(self) -> dict[str, str]:
        roles = {name: "matrix" for name, _ in self.named_parameters() if name.endswith("weight")}
        roles |= {name: "vector" for name in roles if "norm" in name}
        own = [name for name, _ in self.named_parameters() if name not in roles]
        roles |= {name: "lowrank" for name in own if name[-1] in "12"}
        return roles | {"w0": "decay"} | {name: "vector" for name in own if name not in (*roles, "w0")}

    def new_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> RecurrentState:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        width = self.options.head_dim
        return RecurrentState(torch.zeros(batch, self.options.heads, width, width, device=device, dtype=wide))

    def cost(self, context: int) -> Cost:
        options = self.options
        weights = sum(p.numel() for p in self.parameters())
        products = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name != "r_k")
        matrix = options.heads * options.head_dim**2
        # S^T a and S^T r are matrix products: two of K x V, a multiply and an add each. Decay and the two rank-one
        # updates are elementwise (5 more operations an element of S) and, like norms, softmax and the bonus, not
        # counted.
        return Cost(2 * products + 4 * matrix, 4 * matrix, 2 * weights + 4 * matrix)


Rates = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Prepare = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int], bool],
    tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
]


def prepared(
    decay_BTC: Tensor,
    iclr_BTC: Tensor,
    w0_C: Tensor,
    a0_C: Tensor,
    k_BTGN: Tensor,
    v_BTGN: Tensor,
    heads: tuple[int, int],
    by_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log W, scaled keys, values, kk and a, [B, T, H, N], of what the low-rank products and projections gave.

    `heads` is (H, N); `by_decay` says how keys are scaled, see `Rwkv7Options.key_scale`."""
    log_w_BTHN, a_BTHN = (x.unflatten(-1, heads) for x in rates_reference(decay_BTC, iclr_BTC, w0_C, a0_C))
    repeats = heads[0] // k_BTGN.shape[2]
    k_BTHN = _wide(k_BTGN).repeat_interleave(repeats, 2)
    v_BTHN = v_BTGN.repeat_interleave(repeats, 2)
    kk_BTHN = _unit(k_BTHN)
    if by_decay:
        k_BTHN = k_BTHN * (1 - log_w_BTHN.exp() + a_BTHN)
    else:
        u_BTHN = (w0_C + _wide(decay_BTC)).unflatten(-1, heads)
        k_BTHN = k_BTHN * (1.5 - nn.functional.logsigmoid(u_BTHN) + a_BTHN)  # l = log sigmoid(u) - 1/2
    return log_w_BTHN, k_BTHN, v_BTHN, kk_BTHN, a_BTHN


def _unit(k: Tensor) -> Tensor:
    return k / (k.norm(dim=-1, keepdim=True) + 1e-12)


def _without_padding(
    span: Span, log_w: Tensor, k: Tensor, v: Tensor, kk: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log W, keys, values and unit keys of the identity token in the place of padding: it neither decays the state nor
    writes to it."""
    if span.valid_BT is None:
        return log_w, k, v, kk
    valid_BT11 = span.valid_BT[:, :, None, None]
    log_w, k, v, kk = (
        torch.where(valid_BT11, t, torch.zeros((), dtype=t.dtype, device=t.device)) for t in (log_w, k, v, kk)
    )
    return log_w, k, v, kk


def _residual(own_BTGN: Tensor, first_BTGN: Tensor, zero: Tensor, product: Tensor) -> Tensor:
    """own + (first - own) sigmoid(zero + product), rounded once."""
    share_BTGN = torch.sigmoid(zero + _wide(product)).view(own_BTGN.shape)
    return torch.lerp(_wide(own_BTGN), _wide(first_BTGN), share_BTGN).to(own_BTGN.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
