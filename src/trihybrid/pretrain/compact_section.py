"""The recipe's section on training a compact model."""

from typing import Literal

from pydantic import Field

from trihybrid.train.section import TrainSection


class CompactTrainSection(TrainSection):
    """Next-token training of a compact model on packed documents."""

    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="dtype of the activations; parameters stay float32. auto is bfloat16 on CUDA, else float32",
    )
    compile: bool = Field(default=False, description="compile the loss with torch.compile")
    graph: bool = Field(
        default=False,
        description="replay loss and gradients as one CUDA graph, for steps so short that asking for their kernels "
        "takes longer; elsewhere than on a GPU without effect",
    )
    order: Literal["shuffled", "stream"] = Field(
        default="shuffled",
        description="order of the windows of text: shuffled anew in every epoch, by the loop's seed, or as they lie in "
        "the stream, as the challenge's scripts read them",
    )
    leak: bool = Field(
        default=False,
        description="let mixers look back over the borders of documents inside a row, as the published seed does",
    )
    quantise_from: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="share of the run after which weights are fake-quantised in the forward pass; null is never",
    )

    @property
    def order_seed(self) -> int | None:
        """What `PackedBatches` takes as its seed."""
        return self.loop.seed if self.order == "shuffled" else None
