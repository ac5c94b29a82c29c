"""The recipe's section about compression: how a trained compact model becomes few bytes."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

QuantisedRole = Literal["matrix", "lowrank", "embedding", "head"]
"""Roles whose tensors may become integers; `vector` and `decay` never do, since a few of them steer a whole state."""

Bits = Literal[5, 6, 7, 8, 16]

DEFAULT_BITS: dict[QuantisedRole, Bits] = {"matrix": 6, "lowrank": 8, "embedding": 8, "head": 8}

LIMIT_BYTES = 16_000_000
"""What code and weights may weigh together in the parameter-golf challenge, decimal bytes."""


class CompressSection(BaseModel):
    """How weights are rounded, how the integers are coded, and what the whole may weigh."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    bits: dict[QuantisedRole, Bits] = Field(
        default_factory=lambda: dict(DEFAULT_BITS),
        description="bits of a stored integer for each role, 5 to 8, or 16 to keep the role in float16; a role that "
        "is not named keeps its default (matrix 6, lowrank 8, embedding 8, head 8)",
    )
    clip: Annotated[float, Field(gt=0.0, le=256.0)] | Literal["search"] | None = Field(
        default=None,
        description="what the greatest integer of a row stands for: null is the row's largest magnitude, a number k is "
        "k times the row's root mean square (12.85 is usual; larger costs fewer bytes), search is the share of the "
        "largest magnitude with the least squared error",
    )
    step_floor: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="least step between two stored values; 1/31 is what the published seed and most records round to",
    )
    gptq: bool = Field(
        default=True,
        description="let later columns make up for the rounding error of earlier ones, on calibration tokens",
    )
    calibration_tokens: int = Field(
        default=131_072,
        ge=1,
        le=2**32,
        description="training tokens that gptq looks at; the last batch is read whole",
    )
    small_tensor_elements: int = Field(
        default=4096, ge=0, description="tensors with fewer elements than this stay in float16"
    )
    codec: Literal["smallest", "zlib", "lzma", "zstd", "brotli", "rans", "packed"] = Field(
        default="smallest", description="how the integers are coded; smallest tries all for every tensor"
    )
    limit_bytes: int = Field(
        default=LIMIT_BYTES, ge=1, le=2**40, description="what code and weights may weigh together, bytes"
    )
    fit: bool = Field(
        default=True,
        description="raise clip until the whole is within limit_bytes, where it is not at the given clip",
    )

    @field_validator("bits", mode="after")
    @classmethod
    def _every_role(cls, bits: dict[QuantisedRole, Bits]) -> dict[QuantisedRole, Bits]:
        return {**DEFAULT_BITS, **bits}
