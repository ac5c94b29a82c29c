"""Sizes and options of the RWKV-7 mixer, each with its formula.

The defaults are hxa07i. The others are what earlier revisions of the family did otherwise (`revisions`).

Legend: H heads, G key/value heads, N head width, C = H N channels; x the input, [D] a token.
"""

from dataclasses import dataclass
from typing import Literal

COUNTS = ("hidden_size", "heads", "kv_heads", "head_dim", "decay_rank", "iclr_rank", "gate_rank")
RANKS = ("value_residual_rank", "key_residual_rank", "value_lora_rank")


@dataclass(frozen=True)
class Rwkv7Options:
    """Sizes and options of the mixer. Widths are in channels, ranks in rows of the LoRA matrices.

    Attributes:
        gate: the gate at the start of training: `unit` is exactly one, so that an inherited output projection is
            untouched; `published` is the small random gate of the hxa07 training code.
        qk_norm: r and k are divided by their rms a head and multiplied with a weight [N] (`HeadNorm`).
        rope_base: r and k turn by position after their norm, as transformers' rotate-half: (x_j, x_{j + N/2}) <-
            (c x_j - s x_{j + N/2}, c x_{j + N/2} + s x_j), c and s of position * base^(-2j / N); None for no positions.
            The direction matters, as it does not in attention: a decay a channel does not commute with a turn.
        key_scale: what a key is multiplied with before it is written. `decay`: 1 - W + a, which balances what the
            state loses a step (1 - W by decay, a by removal). `log_log_decay`: 1 - l + a, l = log(-log W), the number
            before the last exponential: what hxa079 to hxa07B were trained with.
        value_residual_rank: > 0 for v <- v + (v_first - v) sigmoid(v0 + (x v1) v2) on G heads, in every slot but the
            first; v_first are the values of the first rwkv7 slot. 0 for none.
        key_residual_rank: likewise for k after its norm and rotation, with k0, k1, k2.
        value_lora_rank: > 0 for v <- v + value_lora_factor (x dv1) dv2 on H heads, after the repetition. 0 for none.
        value_lora_factor: its factor.
        lora_input: what decay, iclr and gate are computed from: the `input` x, or the `receptance` r [C] after its
            norm and rotation.
        bonus: o <- o + (sum_n r k r_k) v a head, with the scaled and repeated k, after o's factor 1 / sqrt(N).
        input_bias: receptance, key and value have biases.
        output_bias: the output projection has one.

    Raises:
        ValueError: a count below 1 or a negative rank, heads that are no multiple of the key/value heads, rope with an
            odd head width or a base of at most 1.
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
    qk_norm: bool = True
    rope_base: float | None = None
    key_scale: Literal["decay", "log_log_decay"] = "decay"
    value_residual_rank: int = 0
    key_residual_rank: int = 0
    value_lora_rank: int = 0
    value_lora_factor: float = 0.2
    lora_input: Literal["input", "receptance"] = "input"
    bonus: bool = False
    input_bias: bool = False
    output_bias: bool = False

    def __post_init__(self) -> None:
        for names, least in ((COUNTS, 1), (RANKS, 0)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"rwkv7.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"rwkv7.heads is {self.heads}; it must be a multiple of rwkv7.kv_heads, {self.kv_heads}"
            )
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'rwkv7.{name} is "{getattr(self, name)}"; choose from {list(allowed)}')
        if self.rope_base is not None and (self.rope_base <= 1 or self.head_dim % 2):
            raise ValueError(
                f"rwkv7.rope_base is {self.rope_base} with a head_dim of {self.head_dim}; a base must be above 1 and "
                "head_dim even, or leave rope_base null"
            )

    @property
    def channels(self) -> int:
        """C, the channels of all heads."""
        return self.heads * self.head_dim

    @property
    def kv_channels(self) -> int:
        """Channels of all key/value heads."""
        return self.kv_heads * self.head_dim

    @property
    def residual(self) -> bool:
        """Whether later slots mix in the values or keys of the first one."""
        return bool(self.value_residual_rank or self.key_residual_rank)

    @property
    def shares_keys(self) -> bool:
        """Whether the heads of a group differ in their keys and values by no more than decay and iclr, and nothing else
        reads a head's own: the form of `ops.wkv7.grouped`."""
        return self.key_scale == "decay" and not self.value_lora_rank and not self.bonus


CHOICES = {
    "gate": ("unit", "published"),
    "key_scale": ("decay", "log_log_decay"),
    "lora_input": ("input", "receptance"),
}
