"""The RWKV-7 mixer of the hxa07i family: grouped keys and values, QK-norm, no RoPE, no token shift.

Equations: the RWKV-7 paper (arXiv 2503.14456) for the recurrence; the OpenMOSE hxa07i revision for everything around
it (model card of RWKV-Gemma-4-5B-E2B-Preview-v0.1 and the 07i graph published for llama.cpp).

    r = norm(W_r x)   k = norm(W_k x)   v = W_v x              H heads of r, G of k and v, width N
    u = w0 + tanh(x w1) w2      log W = -exp(-1/2) sigmoid(u)  decay, float32, W in (0.545, 1)
    a = sigmoid(a0 + (x a1) a2)                                in-context learning rate (iclr)
    g = sigmoid(x g1) g2                                       gate
    k, v repeated to H heads (head h reads h // (H / G));  kk = k / |k|;  k <- k (1 - W + a)
    S_t = diag(W_t) S_{t-1} + (kk_t a_t) (-kk_t^T S_{t-1}) + k_t v_t^T;   o_t = S_t^T r_t / sqrt(N)
    y = W_o (o * g)

Legend: B batch, T time, D model width, H heads, G key/value heads, N head width, C = H N channels.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trihybrid.mixers.contract import Cost, HeadNorm, Mixer, Projection, Shared, Write, low_rank
from trihybrid.mixers.span import Span
from trihybrid.mixers.state import RecurrentState, State
from trihybrid.ops.wkv7 import wkv7

DECAY_FLOOR = -math.exp(-0.5)
"""log W approaches this from above: -exp(-1/2), about -0.6065."""


@dataclass(frozen=True)
class Rwkv7Options:
    """Sizes of the mixer. Widths are in channels, ranks in rows of the LoRA matrices.

    `gate` chooses the gate at the start of training: `unit` is exactly one, so that an inherited output projection is
    untouched; `published` is the small random gate of the hxa07 training code. `input_bias` adds a bias to W_r, W_k and
    W_v, `output_bias` to W_o, for teachers that have them (as the training code of the family does).
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    decay_rank: int
    iclr_rank: int
    gate_rank: int
    norm_epsilon: float = 1e-6
    gate: Literal["unit", "published"] = "unit"
    input_bias: bool = False
    output_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "heads", "kv_heads", "head_dim", "decay_rank", "iclr_rank", "gate_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"rwkv7.{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"rwkv7.heads is {self.heads}; it must be a multiple of rwkv7.kv_heads, {self.kv_heads}"
            )


class Rwkv7(Mixer):
    """RWKV-7 (hxa07i) with optional keys and values of a donor slot.

    Args:
        options: sizes.
        index: index of the slot, under which keys and values are published.
        donor: index of an earlier rwkv7 slot whose normalised keys and values this one reads; it then has no key and
            value projections of its own.
        backend: name of the WKV-7 backend, or None for the best one of the device.
    """

    kind = "rwkv7"
    w1: nn.Parameter
    w2: nn.Parameter
    a1: nn.Parameter
    a2: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter

    def __init__(
        self, options: Rwkv7Options, index: int, donor: int | None = None, backend: str | None = None
    ) -> None:
        super().__init__()
        self.options, self.publishes, self.donor, self.backend = options, index, donor, backend
        hidden, channels = options.hidden_size, options.heads * options.head_dim
        biased = options.input_bias
        self.receptance = Projection(hidden, channels, bias=biased)
        self.r_norm = HeadNorm(options.head_dim, options.norm_epsilon)
        if donor is None:
            self.key = Projection(hidden, options.kv_heads * options.head_dim, bias=biased)
            self.value = Projection(hidden, options.kv_heads * options.head_dim, bias=biased)
            self.k_norm = HeadNorm(options.head_dim, options.norm_epsilon)
        self.output = Projection(channels, hidden, bias=options.output_bias)
        self.w0, self.a0 = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        for letter, rank in (("w", options.decay_rank), ("a", options.iclr_rank), ("g", options.gate_rank)):
            self.register_parameter(f"{letter}1", nn.Parameter(torch.empty(hidden, rank)))
            self.register_parameter(f"{letter}2", nn.Parameter(torch.empty(rank, channels)))

    def forward(
        self, x_BTD: Tensor, span: Span, state: State | None, shared: Shared
    ) -> tuple[Tensor, State | None]:
        o_BTC, g_BTC, after = self.recur(x_BTD, span, state, shared)
        return self.output(o_BTC * g_BTC), after

    def recur(
        self, x_BTD: Tensor, span: Span, state: State | None, shared: Shared
    ) -> tuple[Tensor, Tensor, RecurrentState]:
        """The mixer up to its output projection: normalised reads o and gate g, both [B, T, C], and the state."""
        if state is not None and not isinstance(state, RecurrentState):
            raise ValueError(f"rwkv7 needs a RecurrentState, got {type(state).__name__}")
        options = self.options
        heads = (options.heads, options.head_dim)
        r_BTHN = self.r_norm(self.receptance(x_BTD).unflatten(-1, heads))
        k_BTGN, v_BTGN = self._keys_values(x_BTD, shared)

        # From their pre-activations on, decay and iclr are float32: in bf16 a W near one would lose its distance from
        # one, and a float32 master weight would mean something else than the bf16 weight that it is saved as.
        u_BTHN = (self.w0 + _wide(low_rank(x_BTD, self.w1, self.w2, torch.tanh))).unflatten(-1, heads)
        log_w_BTHN = DECAY_FLOOR * torch.sigmoid(u_BTHN)
        a_BTHN = torch.sigmoid(self.a0 + _wide(low_rank(x_BTD, self.a1, self.a2))).unflatten(-1, heads)
        g_BTC = low_rank(x_BTD, self.g1, self.g2, torch.sigmoid)

        repeats = options.heads // options.kv_heads
        k_BTHN = _wide(k_BTGN).repeat_interleave(repeats, 2)
        v_BTHN = v_BTGN.repeat_interleave(repeats, 2)
        kk_BTHN = k_BTHN / (k_BTHN.norm(dim=-1, keepdim=True) + 1e-12)
        k_BTHN = k_BTHN * (1 - log_w_BTHN.exp() + a_BTHN)
        if span.valid_BT is not None:
            # Padding is the identity token: it neither decays the state nor writes to it.
            valid_BT11 = span.valid_BT[:, :, None, None]
            log_w_BTHN, k_BTHN, v_BTHN, kk_BTHN = (
                torch.where(valid_BT11, t, torch.zeros((), dtype=t.dtype, device=t.device))
                for t in (log_w_BTHN, k_BTHN, v_BTHN, kk_BTHN)
            )
        o_BTHN, matrix_BHNN = wkv7(
            r_BTHN,
            log_w_BTHN,
            k_BTHN,
            v_BTHN,
            -kk_BTHN,
            kk_BTHN * a_BTHN,
            None if state is None else state.matrix_BHKV,
            span.reset_BT,
            self.backend,
        )
        o_BTC = (o_BTHN * options.head_dim**-0.5).flatten(-2).to(x_BTD.dtype)
        return o_BTC, g_BTC, RecurrentState(matrix_BHNN)

    def _keys_values(self, x_BTD: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        if self.donor is not None:
            return shared.keys_values[self.kind, self.donor]
        groups = (self.options.kv_heads, self.options.head_dim)
        k_BTGN = self.k_norm(self.key(x_BTD).unflatten(-1, groups))
        v_BTGN = self.value(x_BTD).unflatten(-1, groups)
        if self.publishes is not None:
            shared.keys_values[self.kind, self.publishes] = k_BTGN, v_BTGN
        return k_BTGN, v_BTGN

    def initialise(self, index: int, count: int, write: Write) -> None:
        """hxa07c's start for decay, iclr and LoRAs (the training code of the family), normal projections, and the gate
        of `options.gate`.

        With depth p = index / (count - 1) and channel n of C, zz = z|z| for z from -1 to 1 inside a head:
        w0 = -6 + 6 (n / (C-1))^(1 + p^0.3) + 0.5 + 2.5 zz;  a0 = -0.19 + 0.3 zz + 0.4 (n / (C-1) - 0.5).
        """
        options = self.options
        channels = options.heads * options.head_dim
        depth = index / max(count - 1, 1)
        n_C = torch.arange(channels)
        ratio_C = n_C / max(channels - 1, 1)
        half = max((options.head_dim - 1) / 2, 0.5)
        z_C = ((n_C % options.head_dim) - (options.head_dim - 1) / 2) / half
        zz_C = z_C * z_C.abs()
        write(self.w0, -5.5 + 6 * ratio_C ** (1 + depth**0.3) + 2.5 * zz_C)
        write(self.a0, -0.19 + 0.3 * zz_C + 0.4 * (ratio_C - 0.5))
        for name in ("w1", "w2", "a1", "a2"):
            write(getattr(self, name), scaled_orthogonal(getattr(self, name).shape))
        write_gate(self.g1, self.g2, options.gate, write)
        projections = [self.receptance, self.output] + (
            [] if self.donor is not None else [self.key, self.value]
        )
        for projection in projections:
            write(projection.weight, nn.init.normal_(torch.empty(projection.weight.shape), std=0.02))
            if projection.bias is not None:
                write(projection.bias, torch.zeros(projection.bias.shape))
        for norm in [self.r_norm] + ([] if self.donor is not None else [self.k_norm]):
            write(norm.weight, torch.ones(options.head_dim))

    def roles(self) -> dict[str, str]:
        roles = {name: "matrix" for name, _ in self.named_parameters() if name.endswith("weight")}
        roles |= {name: "vector" for name in roles if "norm" in name}
        roles |= {name: "vector" for name, _ in self.named_parameters() if name.endswith("bias")}
        roles |= {f"{letter}{place}": "lowrank" for letter in "wag" for place in "12"}
        return roles | {"w0": "decay", "a0": "vector"}

    def new_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> RecurrentState:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        width = self.options.head_dim
        return RecurrentState(torch.zeros(batch, self.options.heads, width, width, device=device, dtype=wide))

    def cost(self, context: int) -> Cost:
        options = self.options
        weights = sum(p.numel() for p in self.parameters())
        products = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        matrix = options.heads * options.head_dim**2
        # S^T a and S^T r are matrix products: two of K x V, a multiply and an add each. Decay and the two rank-one
        # updates are elementwise (5 more operations an element of S) and, like norms and softmax, not counted.
        return Cost(2 * products + 4 * matrix, 4 * matrix, 2 * weights + 4 * matrix)


def scaled_orthogonal(shape: torch.Size, gain: float = 0.1) -> Tensor:
    """Orthogonal matrix times `gain`, and times sqrt(rows / columns) when it has more rows than columns."""
    rows, columns = shape
    return nn.init.orthogonal_(torch.empty(rows, columns), gain=gain * math.sqrt(max(rows / columns, 1.0)))


def write_gate(g1: Tensor, g2: Tensor, start: str, write: Write) -> None:
    """Initial gate sigmoid(x g1) g2.

    `published`: g1 = 0, g2 small orthogonal, a gate near zero. `unit`: g1 = 0 and rows of g2 around 2 / rank, so that
    the gate is one for every input. Equal rows would get equal gradients for ever and leave a gate of rank one, so the
    rows differ by noise that adds up to zero over the rank.
    """
    write(g1, torch.zeros(g1.shape))
    if start == "published":
        write(g2, scaled_orthogonal(g2.shape))
        return
    rank = g2.shape[0]
    noise = scaled_orthogonal(g2.shape)
    write(g2, 2 / rank + noise - noise.mean(0, keepdim=True))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
