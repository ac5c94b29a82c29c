"""The recipe's section on training a model from scratch."""

from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from transformers import Gemma4TextConfig

from trihybrid.train.section import TrainSection


class PretrainSection(TrainSection):
    """A Gemma-4-shaped teacher trained on the recipe's data."""

    kind: Literal["pretrain"] = Field(default="pretrain", description="next-token loss, all parameters")
    shape: dict[str, Any] = Field(
        description="fields of the Gemma-4 text configuration; the vocabulary is the tokenizer's"
    )
    chunk: int = Field(default=4096, ge=1, description="tokens whose logits exist at once")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of matrix products, and of the teacher that is written; what trains stays float32",
    )

    @property
    def dtype(self) -> torch.dtype | None:
        """`precision` as torch's dtype; None for that of the parameters."""
        return torch.bfloat16 if self.precision == "bfloat16" else None

    def configuration(self, vocabulary: int) -> Gemma4TextConfig:
        """The model's configuration.

        Raises:
            ValueError: a field that the configuration does not have, that is not the shape's to give,
                or that cannot be.
        """
        for name in ("vocab_size", "vocab_size_per_layer_input", "model_type"):
            if name in self.shape:
                raise ValueError(
                    f"shape: {name} is not the shape's to give; it is known without; leave it out"
                )
        known = set(Gemma4TextConfig().to_dict()) | {"global_head_dim", "num_global_key_value_heads"}
        unknown = sorted(set(self.shape) - known)
        if unknown:
            raise ValueError(f"shape: unknown fields {unknown}; see transformers' Gemma4TextConfig")
        sizes = {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
        try:
            base = Gemma4TextConfig.from_dict(dict(self.shape) | sizes)
        except (ValueError, StrictDataclassError) as error:
            raise ValueError(f"shape: {error}") from error
        first_shared = base.num_hidden_layers - base.num_kv_shared_layers
        alone = sorted(set(base.layer_types) - set(base.layer_types[:first_shared]))
        if alone:
            raise ValueError(
                f"shape: num_kv_shared_layers is {base.num_kv_shared_layers}, but no layer below those has the type "
                f"{' or '.join(alone)} to lend keys and values; share fewer"
            )
        return base
