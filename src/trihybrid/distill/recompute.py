"""One layer of a student, with its activations kept for the backward pass or computed again there.

Legend: B batch, T tokens, D model width.
"""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trihybrid.models.decoder.model import HybridModel, Stream


def run_layer(model: HybridModel, index: int, hidden_BTD: Tensor, stream: Stream, recompute: bool) -> Tensor:
    """Layer `index` on hidden states [B, T, D]."""
    if not recompute:
        return model.layer(index, hidden_BTD, stream)
    # Nothing in a layer is random; to note the generator's state takes time, and no graph may.
    return checkpoint(model.layer, index, hidden_BTD, stream, use_reentrant=False, preserve_rng_state=False)
