"""From transformers' forward arguments (2-D mask, position ids, tokens in the cache) to the one `Span` of a forward.

Legend: B batch, T new tokens, S all tokens seen.
"""

from typing import Any

import torch
from torch import Tensor

from trihybrid.mixers.span import Span, contiguous, packed, padded


def build_span(
    batch: int, length: int, start: int, mask: Any, position_ids: Tensor | None, device: torch.device
) -> Span:
    """The span of a block of `length` tokens after `start` others.

    Args:
        mask: 2-D mask [B, start + length], 1 on real tokens, or None.
        position_ids: [B or 1, length] or None. Without a mask, positions that restart mark packed documents.

    Raises:
        ValueError: a mask of another kind or shape; a mask together with packed documents; packed documents that would
            continue a cache.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {shape}; a recurrence needs the 2-D mask [batch, tokens] (1 real, 0 padding)"
        )
    if mask is not None:
        span = padded(mask, length, start)
        if position_ids is not None:
            _refuse_packing(position_ids, span.valid_BT)
        return span
    if position_ids is None or not _restarts(position_ids, None, start):
        return contiguous(batch, length, start, device)
    if start:
        raise ValueError(
            f"position_ids restart (packed documents), but the cache already holds {start} tokens; start empty"
        )
    return packed(position_ids.expand(batch, length))


def refuse_media(input_ids: Tensor, media: dict[int, str]) -> None:
    """Refuse tokens in whose place a multimodal model would put an image, sound or video: here they would be read as
    words. A single new token is the model's own and not looked at.

    Args:
        input_ids: [B, T].
        media: id of such a token -> what it is called.

    Raises:
        ValueError: one of them is there.
    """
    if not media or input_ids.shape[-1] == 1 or torch.compiler.is_compiling():
        return
    found = torch.isin(input_ids, torch.tensor(list(media), device=input_ids.device))
    if bool(found.any()):
        token = int(input_ids[found][0])
        raise ValueError(
            f"input_ids hold {token}, the {media[token]}: this is the text model alone, which has no images, sound or "
            "video; leave them out of the prompt"
        )


def _restarts(position_ids: Tensor, valid_BT: Tensor | None, start: int = 0) -> bool:
    """Whether positions jump between two tokens of the block, or begin a document behind `start` tokens of another."""
    jump_BT = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if valid_BT is not None:
        jump_BT = jump_BT & valid_BT[:, 1:] & valid_BT[:, :-1]
    return bool(jump_BT.any()) or (start > 0 and bool((position_ids[:, 0] == 0).any()))


def _refuse_packing(position_ids: Tensor, valid_BT: Tensor | None) -> None:
    if _restarts(position_ids, valid_BT):
        raise ValueError(
            "attention_mask and packed position_ids (they restart) cannot be combined; give restarting position_ids "
            "alone for packed documents, or a mask alone for padding"
        )
