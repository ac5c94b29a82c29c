"""The recipe's section that says how a teacher becomes a student."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trihybrid.models.pattern import LegendEntry

Sharing = Literal["own", "teacher"]


class Rwkv7Section(BaseModel):
    """Sizes of the RWKV-7 mixers; the number of heads follows from the teacher's query width."""

    model_config = ConfigDict(extra="forbid")
    head_dim: int = Field(
        default=128,
        ge=1,
        le=1024,
        description="channels a head, at most: wider heads of the teacher are split into blocks of it, which must come "
        "out even; others map one to one",
    )
    decay_rank: int = Field(default=256, ge=1, description="rows of the decay's LoRA")
    iclr_rank: int = Field(default=256, ge=1, description="rows of the in-context learning rate's LoRA")
    gate_rank: int = Field(default=256, ge=1, description="rows of the gate's LoRA")
    gate: Literal["unit", "published"] = Field(
        default="unit",
        description="gate at the start: exactly one, or the small random gate of the hxa07 training code",
    )


class TicaSection(BaseModel):
    """Sizes of TICA, the small attention beside the recurrence."""

    model_config = ConfigDict(extra="forbid")
    heads: int = Field(default=4, ge=1, description="query heads")
    kv_heads: int = Field(default=2, ge=1, description="key and value heads; must divide heads")
    head_dim: int = Field(default=128, ge=1, le=1024, description="channels a head")
    gate_rank: int = Field(default=128, ge=1, description="rows of the gate's LoRA")
    start: Literal["fresh", "inherited"] = Field(
        default="fresh",
        description="queries, keys and values at the start: random, or blocks of the teacher's heads without "
        "rotary channels",
    )


def _default_legend() -> dict[str, LegendEntry]:
    return {"S": "sliding", "F": "full", "R": ["rwkv7", "tica"]}


class SurgerySection(BaseModel):
    """What stands in each slot and what its tensors are made from. The defaults are the model card's plan for
    Gemma-4 E2B."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    pattern: str | None = Field(
        default=None,
        description='layout, one letter a layer, as "SSSSR * 7"; none converts every global layer of the teacher',
    )
    legend: dict[str, LegendEntry] = Field(
        default_factory=_default_legend,
        description="mixer or mixers for each letter of the pattern; a full layer that becomes a sliding one takes its "
        "window from here, {mixer: sliding, window: 1024}, or from the teacher",
    )
    rwkv7: Rwkv7Section = Field(default_factory=Rwkv7Section, description="sizes of rwkv7")
    tica: TicaSection = Field(default_factory=TicaSection, description="sizes of tica")
    share_kv: Sharing = Field(
        default="own",
        description="TICA's keys and values: own in every slot, or shared as the teacher shares its own",
    )
    donor_keys_values: Literal["copy", "ridge", "share"] = Field(
        default="copy",
        description="key and value of rwkv7 in layers that have none in the teacher: copied from the donor layer, "
        "fitted to it by ridge regression on calibration tokens, or read from the donor slot at run time",
    )
    ridge: float = Field(
        default=1e-3, gt=0, description="ridge penalty, relative to the mean square of the inputs"
    )
    heads: Literal["permuted", "plain"] = Field(
        default="permuted",
        description="order of the blocks that wide heads are split into: so that queries meet their own keys, or plain "
        "consecutive blocks; without a meaning where heads map one to one",
    )
    calibration_tokens: int | None = Field(
        default=None,
        ge=0,
        description="tokens of text, 0 or at least 256, that scales (and ridge regression) are fitted on; with 0 the "
        "scales come from the teacher's weights alone; not given: 0 where a norm stands behind the teacher's attention "
        "(Gemma) and nothing is fitted, else 8192",
    )

    @model_validator(mode="after")
    def _enough_text(self) -> "SurgerySection":
        tokens = self.calibration_tokens
        if tokens is not None and 0 < tokens < 256:
            raise ValueError(f"calibration_tokens is {tokens}; it must be 0 or at least 256")
        if self.donor_keys_values == "ridge" and tokens == 0:
            raise ValueError(
                'donor_keys_values is "ridge", which is fitted on text; set calibration_tokens (8192, say), or take '
                '"copy"'
            )
        return self
