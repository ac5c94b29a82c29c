"""Does a compact model look ahead? Later tokens are exchanged, and no earlier logit may move.

The reviewers' test of the parameter-golf challenge (flip one future token, compare all logits before it), done for one
token and for all later tokens together, on flat documents and at the borders of packed ones. It tests the model as it
is, on its own device and in its own dtype, and costs a few dozen forwards of one short batch.

Legend: B rows, T time, V vocabulary.
"""

import torch
from torch import Tensor

from trihybrid.evaluate.scoring import evaluation_mode
from trihybrid.mixers.span import Span, contiguous, from_lengths
from trihybrid.models.compact import CompactModel

ALLOWED_MOVE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest move of one token's logits, norm(after - before) / norm(before), that counts as rounding, by the dtype that
the model computes in. Most paths move by exactly 0; a chunked recurrence may round differently beside another chunk."""

FLOOR = 1e-6
"""Logits whose rms is below this count as having this rms."""


def check_causality(model: CompactModel, tokens_BT: Tensor) -> float:
    """Check that no logit depends on a later token; return the largest relative move that was found (mostly 0.0).

    tokens_BT: int64 [B, T], T >= 8, any text. It is read as one document a row, with tokens exchanged at the second
    place, at a quarter, in the middle and at the end; and as three documents a row, with tokens exchanged before, at
    and after each border. What is exchanged is the one token alone, then it and all later ones, which also betrays a
    leak that many tokens share.

    ValueError when a logit moves by more than `ALLOWED_MOVE` (it names the place, the exchanged token and the size) or
    is not finite, or for tokens of another shape. A model whose mixers still put out zero cannot leak and passes.
    """
    if tokens_BT.dim() != 2 or tokens_BT.shape[0] < 1 or tokens_BT.shape[1] < 8:
        raise ValueError(
            f"tokens have shape {list(tokens_BT.shape)}; the causality check needs [B, T] with T >= 8"
        )
    device = next(model.parameters()).device
    tokens_BT = tokens_BT.to(device)
    rows, length = tokens_BT.shape
    borders = (length // 3, 2 * length // 3)
    lengths = [borders[0], borders[1] - borders[0], length - borders[1]]
    documents = Span(from_lengths(lengths, device).positions_BT.expand(rows, length), borders=True)
    flat_places = (1, length // 4, length // 2, length - 1)
    border_places = tuple(border + shift for border in borders for shift in (-1, 0, 1))
    return max(
        _largest_move(
            model, tokens_BT, contiguous(rows, length, device=device), flat_places, "one document a row"
        ),
        _largest_move(
            model,
            tokens_BT,
            documents,
            border_places,
            f"documents that begin at 0, {borders[0]}, {borders[1]}",
        ),
    )


def _largest_move(
    model: CompactModel, tokens_BT: Tensor, span: Span, places: tuple[int, ...], layout: str
) -> float:
    before_BTV, allowed = _logits(model, tokens_BT, span)
    rms = before_BTV.shape[-1] ** 0.5
    size_BT = before_BTV.norm(dim=-1).clamp(min=FLOOR * rms)
    other_BT = _exchanged(tokens_BT, model.vocabulary)
    largest = 0.0
    for place in places:
        for exchanged, end in (
            (f"token {place}", place + 1),
            (f"tokens {place} and later", tokens_BT.shape[1]),
        ):
            changed_BT = tokens_BT.clone()
            changed_BT[:, place:end] = other_BT[:, place:end]
            after_BTV, _ = _logits(model, changed_BT, span)
            move_BT = ((after_BTV - before_BTV).norm(dim=-1) / size_BT)[:, :place]
            move = float(move_BT.max())
            if move > allowed:
                row, position = divmod(int(move_BT.argmax()), place)
                raise ValueError(
                    f"{type(model).__name__} is not causal: with {layout}, exchanging {exchanged} moves the logits at "
                    f"position {position} of row {row} by {move:.3g} of their norm (allowed: {allowed:.0e}); a part of "
                    "it sees later tokens"
                )
            largest = max(largest, move)
    return largest


def _logits(model: CompactModel, tokens_BT: Tensor, span: Span) -> tuple[Tensor, float]:
    """Logits in float64 and how much they may move."""
    with evaluation_mode(model), torch.inference_mode():
        hidden_BTD, _ = model.hidden(tokens_BT, span)
        logits_BTV = model.logits(hidden_BTD).double()
    if not bool(logits_BTV.isfinite().all()):
        raise ValueError(f"{type(model).__name__} gives logits that are not finite; its weights are broken")
    return logits_BTV, ALLOWED_MOVE[hidden_BTD.dtype]


def _exchanged(tokens_BT: Tensor, vocabulary: int) -> Tensor:
    """Another token in every place, spread over the vocabulary, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    shift_BT = torch.randint(1, max(2, vocabulary), tokens_BT.shape, generator=generator)
    return (tokens_BT + shift_BT.to(tokens_BT.device)) % vocabulary
