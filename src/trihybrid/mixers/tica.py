"""TICA, Tiny Infused Causal Attention: a small gated attention beside a recurrence, for exact retrieval.

Equations: model card of RWKV-Gemma-4-5B-E2B-Preview-v0.1 and the 07i graph published for llama.cpp.

    q = norm(W_q x)   k = norm(W_k x)   v = W_v x       H heads of q, G of k and v, width N, no positional encoding
    att = softmax(q k^T / sqrt(N)) v                    causal over the whole document
    gate = sigmoid(x g1) g2                             no outer sigmoid
    y = W_o (att * gate)                                W_o starts at zero; added after the recurrence's own projection

Legend: B batch, T time, S keys, D model width, H heads, G key/value heads, N head width, C = H N channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trihybrid.mixers.contract import Cost, HeadNorm, Mixer, Projection, Shared, Write, low_rank
from trihybrid.mixers.rwkv7 import write_gate
from trihybrid.mixers.span import Span
from trihybrid.mixers.state import KeyValueState, State
from trihybrid.ops.attention import attention


@dataclass(frozen=True)
class TicaOptions:
    """Sizes of the mixer, in heads, channels a head, and rows of the gate's LoRA matrices."""

    hidden_size: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    gate_rank: int = 128
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("hidden_size", "heads", "kv_heads", "head_dim", "gate_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"tica.{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"tica.heads is {self.heads}; it must be a multiple of tica.kv_heads, {self.kv_heads}"
            )


class Tica(Mixer):
    """Tiny causal attention with optional keys and values of a donor slot.

    Args:
        options: sizes.
        index: index of the slot, under which keys and values are published.
        donor: index of an earlier tica slot whose keys and values (all that are stored) this one reads; it then has no
            key and value projections and no state.
    """

    kind = "tica"

    def __init__(self, options: TicaOptions, index: int, donor: int | None = None) -> None:
        super().__init__()
        self.options, self.publishes, self.donor = options, index, donor
        hidden, channels = options.hidden_size, options.heads * options.head_dim
        self.q_proj = Projection(hidden, channels)
        self.q_norm = HeadNorm(options.head_dim, options.norm_epsilon)
        if donor is None:
            self.k_proj = Projection(hidden, options.kv_heads * options.head_dim)
            self.v_proj = Projection(hidden, options.kv_heads * options.head_dim)
            self.k_norm = HeadNorm(options.head_dim, options.norm_epsilon)
        self.o_proj = Projection(channels, hidden)
        self.g1 = nn.Parameter(torch.empty(hidden, options.gate_rank))
        self.g2 = nn.Parameter(torch.empty(options.gate_rank, channels))

    def forward(
        self, x_BTD: Tensor, span: Span, state: State | None, shared: Shared
    ) -> tuple[Tensor, State | None]:
        q_BTHN = self.queries(x_BTD)
        if span.part is not None and state is not None:
            raise ValueError(
                "state: a part of rows reads what lies before it from the other parts; give no state"
            )
        k_BGSN, v_BGSN, after = self._all_keys_values(x_BTD, state, shared)
        if span.part is not None:
            # Published and kept are the part's own.
            k_BSGN, v_BSGN = span.part.lengthened(k_BGSN.transpose(1, 2), v_BGSN.transpose(1, 2))
            k_BGSN, v_BGSN = k_BSGN.transpose(1, 2), v_BSGN.transpose(1, 2)
        visible_BTS = span.visible(k_BGSN.shape[2])
        att_BTHN = attention(q_BTHN, k_BGSN, v_BGSN, visible_BTS, self.scale)
        return self.outputs(x_BTD, att_BTHN), after

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.options.head_dim**-0.5

    def queries(self, x_BTD: Tensor) -> Tensor:
        """Normed queries, [B, T, H, N]."""
        return self.q_norm(self.q_proj(x_BTD).unflatten(-1, (self.options.heads, self.options.head_dim)))

    def keys_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Normed keys and values of a block of tokens, [B, T, G, N]; for a mixer without a donor."""
        groups = (self.options.kv_heads, self.options.head_dim)
        return self.k_norm(self.k_proj(x_BTD).unflatten(-1, groups)), self.v_proj(x_BTD).unflatten(-1, groups)

    def outputs(self, x_BTD: Tensor, att_BTHN: Tensor) -> Tensor:
        """What was read, gated and projected: [B, T, D]."""
        return self.o_proj(att_BTHN.flatten(-2) * low_rank(x_BTD, self.g1, self.g2, torch.sigmoid))

    def _all_keys_values(
        self, x_BTD: Tensor, state: State | None, shared: Shared
    ) -> tuple[Tensor, Tensor, State | None]:
        if self.donor is not None:
            keys, values = shared.keys_values[self.kind, self.donor]
            return keys, values, None
        k_BGTN, v_BGTN = (part.transpose(1, 2) for part in self.keys_values(x_BTD))
        if state is None:
            keys, values, after = k_BGTN, v_BGTN, KeyValueState(k_BGTN, v_BGTN)
        else:
            keys, values, after = state.append(k_BGTN, v_BGTN)  # type: ignore[attr-defined]
        if self.publishes is not None:
            shared.keys_values[self.kind, self.publishes] = keys, values
        return keys, values, after

    def initialise(self, index: int, count: int, write: Write) -> None:
        """Normal projections (std 0.02), norms and gate at one, and an output projection of zero: the slot starts as
        its recurrence alone, and the first gradient reaches W_o in full."""
        own = [self.q_proj] + ([] if self.donor is not None else [self.k_proj, self.v_proj])
        for projection in own:
            write(projection.weight, nn.init.normal_(torch.empty(projection.weight.shape), std=0.02))
        for norm in [self.q_norm] + ([] if self.donor is not None else [self.k_norm]):
            write(norm.weight, torch.ones(self.options.head_dim))
        write(self.o_proj.weight, torch.zeros(self.o_proj.weight.shape))
        write_gate(self.g1, self.g2, "unit", write)

    def roles(self) -> dict[str, str]:
        roles = {name: "matrix" for name, _ in self.named_parameters() if name.endswith("weight")}
        roles |= {name: "vector" for name in roles if "norm" in name}
        return roles | {"g1": "lowrank", "g2": "lowrank"}

    def new_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> KeyValueState | None:
        if self.donor is not None:
            return None
        shape = (batch, self.options.kv_heads, 0, self.options.head_dim)
        empty = torch.zeros(shape, device=device, dtype=dtype)
        return KeyValueState(empty, empty.clone())

    def cost(self, context: int) -> Cost:
        options = self.options
        weights = sum(p.numel() for p in self.parameters())
        products = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        scores = 4 * options.heads * options.head_dim * context
        stored = 2 * 2 * options.kv_heads * options.head_dim * context
        return Cost(2 * products + scores, 0 if self.donor is not None else stored, 2 * weights + stored)
