"""A retained slot behind our mixer contract: transformers' own Gemma-4 attention, `full` or `sliding`.

Inside a model the retained layers run through transformers' decoder layers and caches. This adapter runs the same
module through our `Span` and `KeyValueState`, so that laws, costs and recorded vectors cover the teacher's attention.

    q = rotary(norm(W_q x))   k = rotary(norm(W_k x))   v = norm(W_v x)   y = W_o softmax(q k^T) v

Legend: B batch, T new tokens, S keys that are seen, D model width, G key/value heads, N head width,
R rotary pairs.
"""

from copy import deepcopy

import torch
from torch import Tensor
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention, Gemma4TextRotaryEmbedding

from trihybrid.mixers.contract import Cost, Mixer, Shared, Write
from trihybrid.mixers.span import Span
from trihybrid.mixers.state import KeyValueState, State
from trihybrid.models.anatomy import anatomy
from trihybrid.models.cache import CACHE

IMPLEMENTATIONS = ("sdpa", "eager")


class RetainedAttention(Mixer):
    """The teacher's attention of one layer.

    Args:
        base: the teacher's text configuration. Its attention implementation is kept, `sdpa` where it has none.
        index: index of the layer. Its kind, its window and the layer whose keys and values it reads follow from `base`.

    Raises:
        ValueError: an attention implementation other than `sdpa` and `eager` (the others take no boolean mask), or
            attention in both directions; rotary frequencies that depend on the length.
    """

    def __init__(self, base: Gemma4TextConfig, index: int) -> None:
        super().__init__()
        base = deepcopy(base)
        base._attn_implementation = base._attn_implementation or "sdpa"
        if base._attn_implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f'attn_implementation is "{base._attn_implementation}"; the adapter of retained attention takes '
                f"{' or '.join(IMPLEMENTATIONS)}"
            )
        layer = anatomy(base).attentions[index]
        self.kind, owner = layer.kind, layer.owner
        self.window: int | None = base.sliding_window if self.kind == "sliding" else None
        self.donor = None if owner == index else owner
        self.publishes = index if self.donor is None else None
        self.attention = Gemma4TextAttention(base, index)
        rotary, layer_type = Gemma4TextRotaryEmbedding(base), base.layer_types[index]
        if rotary.rope_type[layer_type] in ("dynamic", "longrope"):
            raise ValueError(
                f'rope_type of {layer_type} is "{rotary.rope_type[layer_type]}", whose frequencies depend on the '
                'length that was seen; a mixer takes fixed ones, as "default" and "proportional"'
            )
        # Neither a submodule nor a buffer: `.to(torch.bfloat16)` would round the frequencies.
        self._frequencies_R = getattr(rotary, f"{layer_type}_inv_freq").detach().clone()
        self._rotary_scale = getattr(rotary, f"{layer_type}_attention_scaling")

    def forward(
        self, x_BTD: Tensor, span: Span, state: State | None, shared: Shared
    ) -> tuple[Tensor, State | None]:
        if state is None:
            state = self.new_state(x_BTD.shape[0], x_BTD.device, x_BTD.dtype)
        elif not isinstance(state, KeyValueState):
            raise ValueError(f"{self.kind} attention needs a KeyValueState, got {type(state).__name__}")
        store = None if self.donor is not None else _Store(state)
        layer_type = self.attention.layer_type
        teacher_shared = {} if self.donor is None else {layer_type: shared.keys_values[self.kind, self.donor]}
        stored = 0 if state is None else state.length
        keys = stored + span.length if self.donor is None else teacher_shared[layer_type][0].shape[2]
        y_BTD, _ = self.attention(
            x_BTD,
            position_embeddings=self._rotary(x_BTD, span.positions_BT),
            attention_mask=self._mask(span, keys, x_BTD),
            shared_kv_states=teacher_shared,
            **{CACHE: store},
        )
        if store is None:
            return y_BTD, None
        if self.publishes is not None:
            shared.keys_values[self.kind, self.publishes] = store.seen
        return y_BTD, store.state

    def _rotary(self, x_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        # As transformers' own table, which 5.17 computes by a matrix product of inner width 1: FLOPs for nothing.
        angles_BTR = positions_BT[..., None].float() * self._frequencies_R.to(x_BTD.device, torch.float32)
        angles_BTN = torch.cat([angles_BTR, angles_BTR], -1)
        cos_BTN, sin_BTN = angles_BTN.cos() * self._rotary_scale, angles_BTN.sin() * self._rotary_scale
        return cos_BTN.to(x_BTD.dtype), sin_BTN.to(x_BTD.dtype)

    def _mask(self, span: Span, keys: int, x_BTD: Tensor) -> Tensor | None:
        visible_BTS = span.visible(keys, self.window, span.start + span.length - keys)
        if self.attention.config._attn_implementation == "sdpa":
            return None if visible_BTS is None else visible_BTS[:, None]
        # The eager path adds its mask to the scores and, given none, is not causal.
        if visible_BTS is None:
            visible_BTS = torch.ones(span.length, keys, dtype=torch.bool, device=x_BTD.device).tril(
                keys - span.length
            )[None]
        hidden = torch.zeros(visible_BTS.shape, dtype=x_BTD.dtype, device=x_BTD.device)
        return hidden.masked_fill(~visible_BTS, torch.finfo(x_BTD.dtype).min)[:, None]

    def initialise(self, index: int, count: int, write: Write) -> None:
        """Writes nothing: a retained layer has the teacher's weights, which come from its checkpoint."""

    def roles(self) -> dict[str, str]:
        return {name: "matrix" if p.dim() == 2 else "vector" for name, p in self.named_parameters()}

    def new_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> KeyValueState | None:
        """An empty store; a window of n tokens, the current one included, needs the n - 1 before it."""
        if self.donor is not None:
            return None
        shape = (batch, self._kv_heads(), 0, self.attention.head_dim)
        keep = None if self.window is None else self.window - 1
        empty = torch.zeros(shape, device=device, dtype=dtype)
        return KeyValueState(empty, empty.clone(), keep)

    def cost(self, context: int) -> Cost:
        """Scores and values over the tokens that are seen, `window` of them at most; the state holds one fewer."""
        seen = context if self.window is None else min(context, self.window)
        kept = context if self.window is None else min(context, self.window - 1)
        weights = sum(p.numel() for p in self.parameters())
        products = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        heads = self.attention.config.num_attention_heads
        token_bytes = 2 * 2 * self._kv_heads() * self.attention.head_dim
        return Cost(
            2 * products + 4 * heads * self.attention.head_dim * seen,
            0 if self.donor is not None else token_bytes * kept,
            2 * weights + token_bytes * seen,
        )

    def _kv_heads(self) -> int:
        return self.attention.config.num_attention_heads // self.attention.num_key_value_groups


class _Store:
    """Stands where transformers' attention expects its cache: `update` appends to a state of ours."""

    def __init__(self, state: KeyValueState | None) -> None:
        assert state is not None
        self.state = state
        self.seen = (state.keys_BGSD, state.values_BGSD)

    def update(
        self, k_BGTN: Tensor, v_BGTN: Tensor, layer: int, kwargs: dict | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, values, self.state = self.state.append(k_BGTN, v_BGTN)
        self.seen = (keys, values)
        return self.seen
