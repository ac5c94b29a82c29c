"""The part of a recipe that says how much is evaluated."""

from pydantic import BaseModel, ConfigDict, Field


class EvaluationSection(BaseModel):
    """How every stage of a run is evaluated; one section, so that the rows of all stages compare."""

    model_config = ConfigDict(extra="forbid")

    sequence_length: int = Field(
        default=512, ge=2, le=1_048_576, description="Tokens of context that the validation text is cut into."
    )
    batch_size: int = Field(
        default=8, ge=1, le=4096, description="Sequences, and recall documents, at a time."
    )
    validation_tokens: int | None = Field(
        default=None,
        ge=2,
        description="At most so many validation tokens, in whole documents from the first; null for all.",
    )
    recall_documents: int | None = Field(
        default=None, ge=1, description="At most so many recall documents, from the first; null for all."
    )
    position_buckets: int = Field(
        default=8,
        ge=1,
        le=32,
        description="Buckets of the loss by position, each twice as long as the one before.",
    )
