"""The recipe's section on the shape of a compact model: every part of PR 1007's hybrid, each to be left out by name."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trihybrid.mixers.attention import AttentionOptions
from trihybrid.mixers.front import FrontOptions
from trihybrid.mixers.rwkv7 import Rwkv7Options
from trihybrid.mixers.tica import TicaOptions
from trihybrid.mixers.token_shift import TokenShiftOptions
from trihybrid.models.pattern import KINDS, LegendEntry, Slot, read_slots

ATTENTION_OPTIONS = frozenset({"xsa", "value_residual", "rope_dims"})
OPTIONS = {
    "full": ATTENTION_OPTIONS,
    "sliding": ATTENTION_OPTIONS | {"window"},
    "token_shift": frozenset({"back"}),
}
FLAGS = frozenset({"xsa", "value_residual"})
"""Options that are true or false; the others are integers."""
LEGEND: dict[str, LegendEntry] = {
    "T": "token_shift",
    "W": {"mixer": "sliding", "window": 128},
    "X": {"mixer": "sliding", "window": 128, "xsa": True},
    "F": {"mixer": "full", "xsa": True},
    "A": "full",
    "R": "rwkv7",
}


class Rwkv7Section(BaseModel):
    """Sizes of RWKV-7 slots."""

    model_config = ConfigDict(extra="forbid")
    heads: int = Field(default=8, ge=1, le=1024, description="heads of the recurrence")
    kv_heads: int = Field(default=4, ge=1, le=1024, description="key and value heads, a divisor of heads")
    head_dim: int = Field(default=64, ge=1, le=4096, description="channels a head")
    decay_rank: int = Field(default=32, ge=1, le=4096, description="rank of the decay's low-rank product")
    iclr_rank: int = Field(default=32, ge=1, le=4096, description="rank of the in-context learning rate's")
    gate_rank: int = Field(default=64, ge=1, le=4096, description="rank of the gate's")


class TicaSection(BaseModel):
    """Sizes of TICA slots."""

    model_config = ConfigDict(extra="forbid")
    heads: int = Field(default=4, ge=1, le=1024, description="query heads")
    kv_heads: int = Field(default=2, ge=1, le=1024, description="key and value heads, a divisor of heads")
    head_dim: int = Field(default=64, ge=1, le=4096, description="channels a head")
    gate_rank: int = Field(default=64, ge=1, le=4096, description="rank of the gate's low-rank product")


class CompactSection(BaseModel):
    """Shape of a compact model. The vocabulary is the tokenizer's; embedding and head are one matrix."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    hidden_size: int = Field(default=512, ge=1, le=16384, description="width of the residual stream")
    pattern: str = Field(default="TTTTWTTXTTF", description="one letter a layer, with repeats")
    legend: dict[str, LegendEntry] = Field(
        default_factory=lambda: dict(LEGEND),
        description="letter -> mixer, mixers, or a mapping of mixer and options",
    )

    heads: int = Field(default=8, ge=1, le=1024, description="query heads of every attention")
    kv_heads: int = Field(default=4, ge=1, le=1024, description="key and value heads, a divisor of heads")
    head_dim: int = Field(default=64, ge=1, le=4096, description="channels a head")
    rope_dims: int = Field(
        default=16, ge=0, le=4096, description="rotated channels of a head (even), the first ones; 0 for none"
    )
    rope_base: float = Field(default=1e4, gt=1, description="base of the rotary frequencies")
    rope_frequencies: Literal["head", "rotated"] = Field(
        default="rotated",
        description="rotated: spaced over rope_dims; head: the highest of those spaced over head_dim",
    )
    query_gain: float = Field(default=1.5, gt=0, le=100, description="initial gain of normed queries")
    value_residual: bool = Field(
        default=False, description="mix the first attention's values into the later ones"
    )

    mlp_ratio: float = Field(
        default=3.0, gt=0, le=64, description="inner width of the MLP over hidden_size; rounded"
    )
    activation: Literal["leaky_relu2", "relu2"] = Field(
        default="leaky_relu2", description="square of leaky ReLU (slope 0.5) or of ReLU"
    )

    bigram_buckets: int = Field(
        default=2048,
        ge=0,
        le=2**24,
        description="rows of BigramHash, one of them for document starts; 0 for none",
    )
    bigram_width: int = Field(
        default=128, ge=1, le=16384, description="columns of BigramHash before its projection"
    )
    bigram_scale: float = Field(default=0.05, description="initial factor of BigramHash")
    smear: bool = Field(default=True, description="SmearGate after the embedding norm")
    smear_start: float = Field(default=0.0, description="initial gate before the logistic function")
    value_embedding_width: int = Field(
        default=128, ge=1, le=16384, description="columns of the value embedding"
    )
    value_embedding_layers: list[int] = Field(
        default_factory=lambda: [10],
        description="layers whose values get it, each with a factor of its own; ignored where there is no attention",
    )
    value_embedding_scale: float = Field(default=0.1, description="initial factors of the value embedding")

    norm_scale: Literal["none", "attention", "all"] = Field(
        default="attention",
        description="which layers multiply normed inputs by 1 / sqrt(layer + 1)",
    )
    embedding_mix: bool = Field(
        default=True, description="every block reads m0 x + m1 x0, x0 the embedding, m learned a channel"
    )
    branch_scales: bool = Field(default=True, description="learned factors a channel on both branches")
    skips: Literal["none", "unet"] = Field(
        default="none", description="unet: later layers add what the mirrored earlier ones left"
    )
    softcap: float | None = Field(
        default=30.0, gt=0, description="bound of the logits by tanh; null for none"
    )

    embedding_std: float = Field(default=0.005, gt=0, description="of the embedding's normal start")
    matrix_init: Literal["orthogonal", "uniform"] = Field(
        default="orthogonal",
        description="start of projections that do not start at zero; uniform in 1 / sqrt(inputs)",
    )
    rwkv7: Rwkv7Section = Field(default_factory=Rwkv7Section, description="sizes of RWKV-7 slots")
    tica: TicaSection = Field(default_factory=TicaSection, description="sizes of TICA slots")

    @model_validator(mode="after")
    def _readable(self) -> Self:
        slots = self.slots()
        for letter, entry in self.legend.items():
            kinds = entry.get("mixer") if isinstance(entry, dict) else entry
            options: dict[str, Any] = entry if isinstance(entry, dict) else {}
            if "sliding" in ([kinds] if isinstance(kinds, str) else kinds or []) and "window" not in options:
                raise ValueError(
                    f'legend "{letter}": sliding needs a window, as {{mixer: sliding, window: 128}}'
                )
        if not slots:
            raise ValueError(
                f'pattern: "{self.pattern}" has no layer; repeat at least one letter at least once'
            )
        for slot in slots:
            self._check_slot(slot)
        FrontOptions(self.hidden_size, vocabulary=1, bigram_buckets=self.bigram_buckets)
        outside = [index for index in self.value_embedding_layers if not 0 <= index < len(slots)]
        if outside or len(set(self.value_embedding_layers)) != len(self.value_embedding_layers):
            raise ValueError(
                f"value_embedding_layers: {self.value_embedding_layers}; give different layers from 0 to "
                f"{len(slots) - 1}"
            )
        return self

    def slots(self) -> list[Slot]:
        """The layers.

        Raises:
            ValueError: see `read_slots`.
        """
        return read_slots(self.pattern, self.legend, KINDS, OPTIONS)

    def _check_slot(self, slot: Slot) -> None:
        """ValueError for options or sizes that the slot's mixers refuse."""
        options, hidden = slot.options, self.hidden_size
        for name, value in options.items():
            if type(value) is not (bool if name in FLAGS else int):
                wanted = "true or false" if name in FLAGS else "an integer"
                raise ValueError(
                    f"legend option {name} of {list(slot.mixers)} is {value!r}; it must be {wanted}"
                )
        if {"full", "sliding"} & set(slot.mixers):
            rope_dims = options.get("rope_dims", self.rope_dims)
            sizes = (hidden, self.heads, self.kv_heads, self.head_dim)
            AttentionOptions(*sizes, window=options.get("window"), rope_dims=rope_dims)
        if "token_shift" in slot.mixers:
            TokenShiftOptions(hidden, options.get("back", 1))
        if "rwkv7" in slot.mixers:
            Rwkv7Options(hidden_size=hidden, **self.rwkv7.model_dump())
        if "tica" in slot.mixers:
            TicaOptions(hidden_size=hidden, **self.tica.model_dump())

    @property
    def first_attention(self) -> int:
        """The first layer with an attention, whose values the value residual mixes in; the number of layers if none."""
        slots = self.slots()
        return next((i for i, slot in enumerate(slots) if {"full", "sliding"} & set(slot.mixers)), len(slots))

    @property
    def inner_size(self) -> int:
        """Inner width of the MLP."""
        return max(1, round(self.mlp_ratio * self.hidden_size))
