"""The recipe's section on text that models write."""

from pydantic import BaseModel, ConfigDict, Field


class SamplesSection(BaseModel):
    """Text that the models of a run write for its report."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[str] = Field(default_factory=list, description="beginnings to continue")
    tokens: int = Field(default=120, ge=1, le=4096, description="tokens a continuation")
    temperature: float = Field(default=0.7, ge=0, le=10, description="0 takes the likeliest token")
