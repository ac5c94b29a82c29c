"""The recipe's sections on distillation stages."""

from typing import Literal

from pydantic import Field, model_validator

from trihybrid.ops.divergence import VOCABULARY_BLOCK
from trihybrid.train.section import TrainSection

NEW_MIXERS = ["model.layers.*.self_attn.rwkv7.*", "model.layers.*.self_attn.tica.*"]


class StageSection(TrainSection):
    """What all stages share."""

    train: list[str] = Field(
        default_factory=lambda: list(NEW_MIXERS), description="names of parameters to train, with *"
    )
    parallel: Literal["replicate", "shard"] = Field(
        default="replicate",
        description="under torchrun, what each process holds: replicate, all weights; shard, its rows of them (FSDP2), "
        "less memory and more traffic",
    )
    context: int = Field(
        default=1,
        ge=1,
        description="under torchrun, how many processes share each row, each with an equal and contiguous part of its "
        "tokens; divides the number of processes and loop.sequence_length",
    )
    tables: Literal["device", "host"] = Field(
        default="device",
        description="where frozen tables lie (per-layer inputs, and an embedding that is not the head too): device, or "
        "host, where the rows of a step are looked up while the step before it runs, less memory of the device",
    )

    @model_validator(mode="after")
    def _parts_of_rows_are_equal(self) -> "StageSection":
        length = self.loop.sequence_length
        if length % self.context:
            raise ValueError(
                f"context: {self.context} does not divide loop.sequence_length {length}; give a divisor, or a length "
                f"that is a multiple of {self.context}"
            )
        return self

    def sharers(self, processes: int) -> int:
        """How many of so many processes share each row: `context`, or 1 for a process that is alone.

        Raises:
            ValueError: `context` does not divide them.
        """
        if processes == 1:
            return 1
        if processes % self.context:
            raise ValueError(
                f"context: {self.context} does not divide the {processes} processes; give one of "
                f"{', '.join(str(n) for n in range(1, processes + 1) if processes % n == 0)}, or start another number"
            )
        return self.context


class AlignSection(StageSection):
    """Stage 1: every converted slot learns the teacher's attention output from the teacher's own hidden states."""

    kind: Literal["align"] = Field(default="align", description="stage 1, hidden alignment")
    checkpointing: bool = Field(
        default=False, description="recompute the student's mixers in the backward pass to save memory"
    )


class VocabularySection(StageSection):
    """What stages share that run the whole student up to its logits."""

    chunk: int = Field(default=1024, ge=1, description="tokens whose logits exist at once")
    block: int = Field(
        default=VOCABULARY_BLOCK,
        ge=1,
        description="words of the vocabulary whose logits exist at once; where that is all of them, logits are kept "
        "for the gradient, not computed again: more memory a token, less time",
    )
    checkpointing: bool = Field(
        default=False, description="recompute the student's layers in the backward pass to save memory"
    )
    kept_layers: int = Field(
        default=0, ge=0, description="layers at the top that are not recomputed: more memory, less time"
    )

    @model_validator(mode="after")
    def _kept_of_what(self) -> "VocabularySection":
        if self.kept_layers and not self.checkpointing:
            raise ValueError(
                f"kept_layers: {self.kept_layers}, but checkpointing is off and keeps all; switch it on, or remove this"
            )
        return self


class MatchSection(VocabularySection):
    """Stage 2: the student's distribution follows the teacher's, on the student's own hidden states."""

    kind: Literal["match"] = Field(
        default="match", description="stage 2, forward KL with cumulative hidden alignment"
    )
    temperature: float = Field(
        default=1.0, gt=0, le=100, description="temperature of both distributions in the KL"
    )
    alignment_weight: float = Field(
        default=0.1, ge=0, le=100, description="weight of the cumulative hidden alignment"
    )
    vocabulary: Literal["all", "training"] = Field(
        default="all",
        description="tokens that the KL compares: all, or those that occur in the training text",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="compare the teacher's most likely tokens and one bucket for the rest; null compares all",
    )
    graph: bool = Field(
        default=False,
        description="replay loss and gradients as one CUDA graph, for batches so small that asking for their kernels "
        "takes longer than they do; without effect off the GPU",
    )

    @model_validator(mode="after")
    def _graph_of_what(self) -> "MatchSection":
        if self.graph and self.vocabulary == "training":
            raise ValueError(
                "graph: true with vocabulary 'training', whose tokens are checked in every step; give vocabulary "
                "'all', maybe with top_k, or no graph"
            )
        if self.graph and self.parallel == "shard":
            raise ValueError(
                "graph: true with parallel 'shard', whose weights come and go in every step; give parallel "
                "'replicate', or no graph"
            )
        if self.graph and self.context > 1:
            raise ValueError(
                f"graph: true with context {self.context}, whose processes wait for each other in every layer; give "
                "context 1, or no graph"
            )
        return self


class ExtendSection(VocabularySection):
    """Stage 3: longer rows, from the text itself or from the teacher."""

    kind: Literal["extend"] = Field(default="extend", description="stage 3, longer contexts")
    loss: Literal["cross_entropy", "kl"] = Field(
        default="cross_entropy",
        description="cross_entropy: of the next token, without the teacher; kl: stage 2's, without its alignment",
    )
    checkpointing: bool = Field(
        default=True, description="recompute the student's layers in the backward pass to save memory"
    )
