"""The recipe of a compact model: text, shape, training, quantisation, what is measured and what is promised.

Each section belongs to the room that it configures; here they are put together, with what they demand of each other.
"""

from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trihybrid.compress.section import CompressSection
from trihybrid.data.corpus import CorpusSection
from trihybrid.evaluate.section import AdaptationSection
from trihybrid.infer.section import SamplesSection
from trihybrid.models.compact.section import CompactSection
from trihybrid.pretrain.compact_section import CompactTrainSection
from trihybrid.recipe.fields import read_fields, validate
from trihybrid.run import hash_json

KIND = "compact"

NOT_CONFIGURATION = {"name": True, "samples": True, "targets": True}
"""Fields that do not change what model comes out or how it is measured."""
NOT_TRAINING = ("seed", "checkpoint_every", "log_every", "keep")
"""Fields of train.loop that count neither: a seed is a repetition, the others say what is written down."""
PATHS = ("train", "validation", "tokenizer")
"""Fields of data that may name a file or folder."""


class CompactEvaluationSection(BaseModel):
    """How bits per byte are measured on the validation text."""

    model_config = ConfigDict(extra="forbid")
    length: int = Field(default=1024, ge=2, le=2**20, description="tokens of a window")
    sliding: bool = Field(default=False, description="score with overlapping windows too")
    stateful: bool = Field(
        default=False,
        description="score with the states of all mixers carried from window to window too; isolated: to the end of "
        "each document, otherwise through the stream",
    )
    stride: int = Field(
        default=64, ge=1, le=2**20, description="tokens between overlapping windows; <= length"
    )
    isolated: bool = Field(
        default=False,
        description="start anew at every document; otherwise a window is one stream, as in the challenge",
    )
    batch_size: int = Field(default=64, ge=1, le=65536, description="windows at once")
    validation_tokens: int | None = Field(
        default=None, ge=2, description="score the first so many tokens only; null scores all"
    )
    adaptation: AdaptationSection | None = Field(
        default=None, description="score-first test-time training, reported apart; null leaves it out"
    )

    @model_validator(mode="after")
    def _strides_fit(self) -> "CompactEvaluationSection":
        adapted = self.adaptation and self.adaptation.stride
        for name, stride in (("stride", self.stride), ("adaptation.stride", adapted or 1)):
            if stride > self.length:
                raise ValueError(f"{name} is {stride}, must not exceed length ({self.length}); lower it")
        return self


class CompactTargetsSection(BaseModel):
    """What the run promises besides fitting its byte limit; a missed target fails the command."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    bpb: float | None = Field(
        default=None,
        ge=0,
        description="decoded bits a byte of the reloaded artifact in plain windows, at most",
    )
    gap: float | None = Field(default=None, ge=0, description="bits a byte that quantisation costs, at most")
    seconds: float | None = Field(default=None, gt=0, description="time of the whole run, at most")


class CompactRecipe(BaseModel):
    """Text, model, training, compression, evaluation."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["compact"] = Field(description="a compact model trained from scratch")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="name of the run, for its folder")
    data: CorpusSection = Field(default_factory=CorpusSection, description="text and tokenizer")
    model: CompactSection = Field(default_factory=CompactSection, description="shape of the model")
    train: CompactTrainSection = Field(description="length, optimizer, schedule, averages")
    compress: CompressSection = Field(
        default_factory=CompressSection, description="bits, entropy coder and byte limit of the artifact"
    )
    evaluation: CompactEvaluationSection = Field(
        default_factory=CompactEvaluationSection, description="how bits per byte are measured"
    )
    samples: SamplesSection = Field(default_factory=SamplesSection, description="generated text")
    targets: CompactTargetsSection = Field(
        default_factory=CompactTargetsSection, description="what the run promises"
    )


def read_compact(source: str | Path, overrides: list[str] | None = None) -> CompactRecipe:
    """A compact recipe from a file, without knowing of recipes of other kinds (a bundle holds no others).

    Raises:
        ValueError: no such file, not YAML, another kind, an unknown key or an impossible value, in one line.
    """
    path, fields = read_fields(source, overrides)
    return validate(CompactRecipe, fields, str(path))


def config_hash(recipe: CompactRecipe) -> str:
    """sha256 of all in a recipe that decides the result, the seed left out: equal for repetitions of one experiment.

    Of paths only the last part counts: where a machine keeps its files is no part of an experiment.
    """
    fields: dict[str, Any] = recipe.model_dump(mode="json", exclude=NOT_CONFIGURATION)
    for name in NOT_TRAINING:
        del fields["train"]["loop"][name]
    for name in PATHS:
        if fields["data"][name] is not None:
            fields["data"][name] = PurePath(fields["data"][name]).name
    return hash_json(fields)
