"""The part of a recipe that says how much is evaluated."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class NeedleSection(BaseModel):
    """Retrieval of planted pairs from long text; see `evaluate.needle`."""

    model_config = ConfigDict(extra="forbid")

    lengths: list[Annotated[int, Field(ge=32, le=1_048_576)]] = Field(
        min_length=1, description="Tokens of the contexts, about, as 1, 2, 4 and 8 times the training length."
    )
    documents: int = Field(default=64, ge=1, le=65536, description="Documents of each length.")
    pairs: int = Field(default=2, ge=1, le=26, description="Pairs in a needle.")
    values: int = Field(default=26, ge=2, le=26, description="Letters of a value: chance is 1 / values.")
    joiner: Literal["", " "] = Field(default="", description="Between key and value, as in data.recall.")
    batch_size: int = Field(default=8, ge=1, le=4096, description="Documents at a time.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Decides texts, keys, values and depths.")
    measured_characters: int = Field(
        default=100_000, ge=64, description="Characters of validation text that tell how long a token is."
    )


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
    needle: NeedleSection | None = Field(
        default=None, description="Retrieval of a needle from long contexts; null leaves it out."
    )


class AdaptationSection(BaseModel):
    """Score-first test-time training: each chunk of the stream is scored, and then trained on."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    chunk_tokens: int = Field(
        default=32_768,
        ge=2,
        le=2**30,
        description="Targets that are scored before the model is trained on them.",
    )
    learning_rate: float = Field(
        default=0.002,
        ge=0,
        le=1,
        description="Of SGD on the first chunk; it falls to 0 on the last by a cosine.",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of SGD, kept from chunk to chunk.")
    epochs: int = Field(default=3, ge=1, le=1000, description="Passes over each chunk.")
    clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient of all parameters.")
    batch_size: int = Field(default=32, ge=1, le=4096, description="Windows in one step of SGD.")
    stride: int | None = Field(
        default=None,
        ge=1,
        description="Stride of the windows that are scored; null for windows side by side.",
    )
