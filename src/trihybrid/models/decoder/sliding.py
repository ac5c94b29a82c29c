"""Retained layers in less than a table of T x T: an attention implementation for transformers' own modules.

transformers' attention looks its function up by a name in the configuration, and hands it the mask that the model made.
Here the mask of a sliding layer may be a `Window`, which says in a few numbers what a table of T x T would, and that of
a full layer whose rows lie on several processes is an `Earlier`. Both then fetch the keys and values of earlier parts.
With any other mask the function is transformers' `sdpa`. Function and mask are registered here and nowhere else.

Legend: B batch, H query heads, G key/value heads, T tokens, S keys, N head width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trihybrid.mixers.span import Span
from trihybrid.ops.attention import attention
from trihybrid.ops.part import Part
from trihybrid.ops.sliding_attention import Documents, sliding_attention

SLIDING = "trihybrid_sliding"
"""Name of the implementation, for `attn_implementation`."""


@dataclass(frozen=True)
class Window:
    """The mask of sliding layers over whole rows without padding: `size` tokens back, inside of one's document.

    With a `part`, `documents` are those of its tokens and of the up to `size` - 1 before them.
    """

    documents: Documents
    size: int
    part: Part | None = None

    def attend(self, q_BTHN: Tensor, k_BTGN: Tensor, v_BTGN: Tensor, scale: float) -> Tensor:
        """[B, T, H, N]."""
        if self.part is None:
            return sliding_attention(q_BTHN, k_BTGN, v_BTGN, self.documents, self.size, scale)
        k_BSGN, v_BSGN = self.part.lengthened(k_BTGN, v_BTGN, self.size - 1)
        # What the queries of earlier tokens would read is computed, and left.
        before = k_BSGN.shape[1] - q_BTHN.shape[1]
        q_BSHN = nn.functional.pad(q_BTHN, (0, 0, 0, 0, before, 0))
        return sliding_attention(q_BSHN, k_BSGN, v_BSGN, self.documents, self.size, scale)[:, before:]


@dataclass(frozen=True)
class Earlier:
    """The mask of full layers over one part of rows without padding: all of one's document, in earlier parts too."""

    span: Span
    part: Part

    @cached_property
    def visible_BTS(self) -> Tensor | None:
        """As `attention` takes it."""
        return self.span.visible(self.span.start + self.span.length)

    def attend(self, q_BTHN: Tensor, k_BTGN: Tensor, v_BTGN: Tensor, scale: float) -> Tensor:
        """[B, T, H, N]."""
        k_BGSN, v_BGSN = (x.transpose(1, 2) for x in self.part.lengthened(k_BTGN, v_BTGN))
        return attention(q_BTHN, k_BGSN, v_BGSN, self.visible_BTS, scale)


Mask = Tensor | Window | Earlier | None
"""What a retained layer may be given."""


def window_of_span(span: Span, size: int) -> Window:
    """The mask for tokens that have nothing before them but earlier parts, and no padding among them."""
    positions_BT, before = span.positions_BT, min(span.start, size - 1)
    if span.part is not None and before:
        place_S = torch.arange(-before, 0, device=positions_BT.device)
        places_BS = positions_BT[:, :1] + place_S
        # What lies before the document that goes on in this part is another one, wherever that began.
        positions_BT = torch.cat([torch.where(places_BS >= 0, places_BS, place_S + before), positions_BT], 1)
    return Window(Documents(positions_BT, span.borders), size, span.part)


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
    attention_mask: Mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,  # transformers hands over what other implementations want: a window, a softcap
) -> tuple[Tensor, None]:
    """[B, T, H, N] of queries [B, H, T, N], keys and values [B, G, T, N].

    Raises:
        ValueError: attention dropout with a `Window` or an `Earlier`.
    """
    if not isinstance(attention_mask, Window | Earlier):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if dropout:
        raise ValueError(
            f"attention_dropout is {dropout}; sliding layers in blocks and rows in parts have none: set it to 0, or "
            'load the model with attn_implementation="sdpa"'
        )
    q_BTHN, k_BTGN, v_BTGN = (x.transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_mask.attend(q_BTHN, k_BTGN, v_BTGN, scale), None


AttentionInterface.register(SLIDING, attend)
AttentionMaskInterface.register(SLIDING, sdpa_mask)
