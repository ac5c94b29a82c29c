"""Next-token training of a causal language model with a softcapped, tied head.

Legend: B batch, T time, D model width, N = B T.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import Gemma4ForCausalLM

from trihybrid.data.packing import IGNORED, Batch
from trihybrid.ops.divergence import softcapped_cross_entropy


class PretrainTask:
    """Mean cross-entropy in nats a token over the batch; tokens across a document border are not predicted.

    Args:
        model: what is trained.
        chunk: tokens whose logits exist at once.
        products: dtype of the layers' matrix products, by autocast, where it is not the model's own.
    """

    def __init__(
        self, model: Gemma4ForCausalLM, chunk: int = 4096, products: torch.dtype | None = None
    ) -> None:
        self.model, self.chunk = model, chunk
        self.products = model.dtype if products is None else products

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.model

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def roles(self) -> dict[str, str]:
        """Embeddings (a tied head is one) and an untied head by name, matrices and vectors by shape."""

        def role(name: str, parameter: nn.Parameter) -> str:
            if "embed_tokens" in name:
                return "embedding"
            if name.startswith("lm_head."):
                return "head"
            return "matrix" if parameter.dim() == 2 else "vector"

        return {name: role(name, parameter) for name, parameter in self.parameters().items()}

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        narrow = self.products != self.model.dtype
        with torch.autocast(batch.inputs.device.type, self.products, enabled=narrow):
            hidden_BTD = self.model.model(
                input_ids=batch.inputs, position_ids=batch.positions, use_cache=False
            ).last_hidden_state
        loss = softcapped_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.model.lm_head.weight,
            batch.targets.flatten(),
            self.model.config.final_logit_softcapping,
            chunk=self.chunk,
        )
        return loss, {}

    def tokens(self, batch: Batch) -> int:
        return batch.inputs.numel()

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """The batch as `parts` batches of equally many rows."""
        return batch.split(parts)

    def weight(self, batch: Batch) -> float:
        """The number of its targets: rows with more documents have fewer."""
        return float((batch.targets != IGNORED).sum())
