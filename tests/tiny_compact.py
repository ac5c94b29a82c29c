"""A compact model with every mixer, small enough for every test, none of whose parameters is silent."""

from typing import Any

import torch
from torch import Tensor

from trihybrid.models.compact import CompactModel, CompactSection
from trihybrid.testing import randomise

WIDE, VOCABULARY, LENGTH = torch.float64, 23, 14
SIZES = {"heads": 2, "kv_heads": 1, "head_dim": 4}
RANKS = {"decay_rank": 2, "iclr_rank": 3, "gate_rank": 2}
ALL: dict[str, Any] = {
    "hidden_size": 8, "pattern": "TWXRQBF", "mlp_ratio": 1.5, "rope_dims": 2, "value_residual": True,
    "legend": {
        "T": "token_shift", "B": {"mixer": "token_shift", "back": 2},
        "W": {"mixer": "sliding", "window": 4}, "X": {"mixer": "sliding", "window": 3, "xsa": True},
        "F": {"mixer": "full", "xsa": True}, "R": "rwkv7", "Q": ["rwkv7", "tica"],
    },
    "bigram_buckets": 11, "bigram_width": 4, "value_embedding_width": 3, "value_embedding_layers": [2, 6],
    "skips": "unet", "rwkv7": SIZES | RANKS, "tica": SIZES | {"gate_rank": 2},
} | SIZES  # fmt: skip


def build(dtype: torch.dtype = WIDE, **changes: Any) -> CompactModel:
    """A small model, none of whose parameters is silent."""
    model = CompactModel(CompactSection.model_validate(ALL | changes), VOCABULARY)
    return randomise(model, 0).to(dtype)  # type: ignore[arg-type,return-value]


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(5))
