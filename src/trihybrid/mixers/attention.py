"""Attention over the whole document or a sliding window, with the parts that small models gain from.

    q = g_h rms(W_q x)     k = rms(W_k x)      v = W_v x         H heads of q, G of k and v, width N; learned gain g_h
    q, k = rotate(q, k)                                           the first `rope_dims` of N channels (partial RoPE)
    v <- v + e                                                    value embedding of the token, where the model has one
    v <- l_0 v_first + l_1 v                                      value residual (arXiv 2410.17897)
    o = softmax(q k^T / sqrt(N)) v                                causal; the last `window` tokens, itself included
    o_h <- o_h - (o_h . u) u,   u = v_t / |v_t|                   XSA: nothing of the token's own value is left
    y = W_o o

QK-norm with a gain and the logit scale: openai/parameter-golf's baseline. XSA and value embeddings: its PR 1007.

Legend: B batch, T time, S keys, D model width, H heads, G key/value heads, N head width, F rotated pairs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trihybrid.mixers.contract import Cost, Mixer, Projection, Shared, Write
from trihybrid.mixers.rotary import rotary
from trihybrid.mixers.span import Span
from trihybrid.mixers.state import KeyValueState, State
from trihybrid.ops.attention import attention
from trihybrid.ops.block_attention import block_attention
from trihybrid.ops.exclude_value import exclude_own_value
from trihybrid.ops.rotary import normed_rotation

EPSILON = 1e-6


@dataclass(frozen=True)
class AttentionOptions:
    """Sizes and parts of the mixer.

    Attributes:
        window: tokens that a query reads, itself included; None for the whole document.
        rope_dims: rotated channels of a head, even, 0 for none.
        rope_frequencies: `rotated` spaces base^(-2j / rope_dims), `head` takes the highest of base^(-2j / head_dim), as
            PR 1007 does.
        query_gain: initial gain of every query head.
    """

    hidden_size: int
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    window: int | None = None
    rope_dims: int = 16
    rope_base: float = 1e4
    rope_frequencies: Literal["head", "rotated"] = "rotated"
    query_gain: float = 1.5
    xsa: bool = False
    value_residual: bool = False
    output_scale: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "heads", "kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"attention.{name} is {value}; it must be at least 1 and below 2**31")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"attention.heads is {self.heads}; it must be a multiple of attention.kv_heads, {self.kv_heads}"
            )
        if self.rope_dims % 2 or not 0 <= self.rope_dims <= self.head_dim:
            raise ValueError(
                f"attention.rope_dims is {self.rope_dims}; it must be even and lie in 0 to head_dim, {self.head_dim}"
            )


class Attention(Mixer):
    """Softmax attention with keys and values of its own.

    Args:
        options: sizes and parts; a window makes it `sliding`, none `full`.
        index: index of its slot, by which it finds its value embedding.
    """

    def __init__(self, options: AttentionOptions, index: int) -> None:
        super().__init__()
        self.options, self.index = options, index
        self.kind = "full" if options.window is None else "sliding"
        hidden, channels = options.hidden_size, options.heads * options.head_dim
        self.query = Projection(hidden, channels)
        self.key = Projection(hidden, options.kv_heads * options.head_dim)
        self.value = Projection(hidden, options.kv_heads * options.head_dim)
        self.output = Projection(channels, hidden, options.output_scale)
        self.gain_H = nn.Parameter(torch.empty(options.heads))
        if options.value_residual:
            self.residual = nn.Parameter(torch.empty(2))

    def forward(
        self, x_BTD: Tensor, span: Span, state: State | None, shared: Shared
    ) -> tuple[Tensor, State | None]:
        options = self.options
        groups = (options.kv_heads, options.head_dim)
        q_BTHN = self.query(x_BTD).unflatten(-1, (options.heads, options.head_dim))
        k_BTGN = self.key(x_BTD).unflatten(-1, groups)
        v_BTGN = self._values(self.value(x_BTD).unflatten(-1, groups), shared)
        spacing = options.rope_dims if options.rope_frequencies == "rotated" else options.head_dim
        cosine, sine = rotary(span, shared, options.rope_dims, options.rope_base, spacing, x_BTD.dtype)
        q_BTHN = normed_rotation(q_BTHN, self.gain_H, cosine, sine, EPSILON)
        k_BTGN = normed_rotation(k_BTGN, None, cosine, sine, EPSILON)
        scale = options.head_dim**-0.5
        after: KeyValueState
        k_BGTN, v_BGTN = k_BTGN.transpose(1, 2), v_BTGN.transpose(1, 2)
        if state is None:
            # Padding counts as an earlier document.
            borders = span.borders or span.valid_BT is not None
            o_BTHN = block_attention(
                q_BTHN, k_BTGN, v_BTGN, span.positions_BT, borders, options.window, scale
            )
            oldest = 0 if self._keep is None else max(0, span.length - self._keep)
            after = KeyValueState(k_BGTN[:, :, oldest:], v_BGTN[:, :, oldest:], self._keep)
        else:
            assert isinstance(state, KeyValueState)
            k_BGSN, v_BGSN, after = state.append(k_BGTN, v_BGTN)
            first = span.start - state.length
            visible_BTS = span.visible(k_BGSN.shape[2], options.window, first)
            o_BTHN = attention(q_BTHN, k_BGSN, v_BGSN, visible_BTS, scale)
        if options.xsa:
            o_BTHN = exclude_own_value(o_BTHN, v_BTGN)
        return self.output(o_BTHN.flatten(-2)), after

    @property
    def _keep(self) -> int | None:
        return None if self.options.window is None else self.options.window - 1

    def _values(self, v_BTGN: Tensor, shared: Shared) -> Tensor:
        embedding_BTGN = shared.value_embeddings.get(self.index)
        if embedding_BTGN is not None:
            v_BTGN = v_BTGN + embedding_BTGN
        if shared.first_values_BTGD is None:
            shared.first_values_BTGD = v_BTGN
        elif self.options.value_residual:
            first, own = self.residual.to(v_BTGN.dtype)
            v_BTGN = first * shared.first_values_BTGD + own * v_BTGN
        return v_BTGN

    def initialise(self, index: int, count: int, write: Write) -> None:
        """Orthogonal projections, an output projection of zero, the options' gain, and equal shares of both values."""
        for projection in (self.query, self.key, self.value):
            write(projection.weight, nn.init.orthogonal_(torch.empty(projection.weight.shape)))
        write(self.output.weight, torch.zeros(self.output.weight.shape))
        if self.output.scale is not None:
            write(self.output.scale, torch.ones(self.output.scale.shape))
        write(self.gain_H, torch.full(self.gain_H.shape, self.options.query_gain))
        if self.options.value_residual:
            write(self.residual, torch.full((2,), 0.5))

    def new_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> KeyValueState:
        shape = (batch, self.options.kv_heads, 0, self.options.head_dim)
        empty = torch.zeros(shape, device=device, dtype=dtype)
        return KeyValueState(empty, empty.clone(), self._keep)

    def cost(self, context: int) -> Cost:
        options = self.options
        weights = sum(p.numel() for p in self.parameters())
        products = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        read = context if options.window is None else min(context, options.window)
        kept = context if options.window is None else min(context, options.window - 1)
        row = 2 * 2 * options.kv_heads * options.head_dim
        scores = 4 * options.heads * options.head_dim * read
        return Cost(2 * products + scores, row * kept, 2 * weights + row * read)
