"""The recipe's section on text that models write, and the bounds of what sampling takes."""

import math

from pydantic import BaseModel, ConfigDict, Field


class SamplesSection(BaseModel):
    """Text that the models of a run write for its report."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[str] = Field(default_factory=list, description="beginnings to continue")
    tokens: int = Field(default=120, ge=1, le=4096, description="tokens a continuation")
    temperature: float = Field(default=0.7, ge=0, le=10, description="0 takes the likeliest token")


def check_sampling(tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """ValueError unless tokens and top_k are at least 1, temperature is 0 (likeliest token) or a finite number above,
    and seed lies in 0 to 2**63 - 1."""
    if tokens < 1 or top_k < 1:
        raise ValueError(f"tokens is {tokens} and top_k {top_k}; both must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}; it must be 0 (likeliest token) or a finite number above"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must lie in 0 to 2**63 - 1")
