"""Retained sliding layers in O(T window): an attention implementation for transformers' own modules.

transformers' attention looks its function up by a name in the configuration, and hands it the mask that the model made.
Here the mask of a sliding layer may be a `Window`, which says in a few numbers what a table of T x T would; with any
other mask the function is transformers' `sdpa`. Both names are registered here and nowhere else.

Legend: B batch, H query heads, G key/value heads, T tokens, N head width.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trihybrid.mixers.span import Span
from trihybrid.ops.sliding_attention import Documents, sliding_attention

SLIDING = "trihybrid_sliding"
"""Name of the implementation, for `attn_implementation`."""


@dataclass(frozen=True)
class Window:
    """The mask of sliding layers over whole rows without padding: `size` tokens back, inside of one's document."""

    documents: Documents
    size: int


def window_of_span(span: Span, size: int) -> Window:
    """The mask for tokens that have nothing before them and no padding among them."""
    return Window(Documents(span.positions_BT, span.borders), size)


def linear_sliding(model: PreTrainedModel) -> None:
    """Let the sliding layers of a student, or of a teacher that a student runs, take O(T window): the same numbers
    up to rounding. A model that was loaded with another implementation than `sdpa` keeps it."""
    if model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = SLIDING


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Window | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,  # transformers hands over what other implementations want: a window, a softcap
) -> tuple[Tensor, None]:
    """[B, T, H, N] of queries [B, H, T, N], keys and values [B, G, T, N].

    Raises:
        ValueError: attention dropout with a `Window`.
    """
    if not isinstance(attention_mask, Window):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if dropout:
        raise ValueError(
            f"attention_dropout is {dropout}; sliding layers in blocks have none: set it to 0, or load the model "
            'with attn_implementation="sdpa"'
        )
    q_BTHN, k_BTGN, v_BTGN = (x.transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return sliding_attention(
        q_BTHN, k_BTGN, v_BTGN, attention_mask.documents, attention_mask.size, scale
    ), None


AttentionInterface.register(SLIDING, attend)
AttentionMaskInterface.register(SLIDING, sdpa_mask)
