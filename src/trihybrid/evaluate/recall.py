"""Associative recall: does a model give back the value that was planted with a key, and from how far?

Shapes: N documents, B documents of one batch, T time (BOS included), V vocabulary, A answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trihybrid.data import RecallSet
from trihybrid.evaluate.scoring import evaluation_mode, next_token_logits


@dataclass(frozen=True)
class Recall:
    """Accuracies in [0, 1] of the most likely token at the answers.

    beyond: over answers whose value was last seen `window` tokens back or more; None without a window.
    overall: over all answers.
    by_distance: {low, high, accuracy, count} for each bucket low <= distance < high (tokens) that has answers.
    """

    beyond: float | None
    overall: float
    by_distance: list[dict[str, int | float]]


def distance_edges(recall_set: RecallSet, window: int | None) -> list[int]:
    """Return borders of distance buckets that cover the set: window times powers of two (powers of two without one).

    The window is a border, so that no bucket holds answers from both sides of it. ValueError when the set has no
    answers, or none at `window` or beyond, so that a recipe can ask before it trains anything.
    """
    distance_A = recall_set.distance_NT[recall_set.answer_NT]
    if len(distance_A) == 0:
        raise ValueError("the recall set has no answers; ask for at least one document, pair and round")
    _check_window(distance_A, window)
    smallest, largest = int(distance_A.min()), int(distance_A.max())
    edges = [window or 1]
    while edges[0] > smallest:
        edges.insert(0, edges[0] // 2)
    while edges[-1] <= largest:
        edges.append(edges[-1] * 2)
    return edges


def recall(
    model: nn.Module,
    recall_set: RecallSet,
    window: int | None,
    batch_size: int,
    edges: Sequence[int] | None = None,
) -> Recall:
    """Accuracy of the argmax at the answers of recall_set, one document a row, in eval mode.

    window: the span of the sliding attention in tokens, None when there is none. edges: increasing borders of the
    distance buckets, by default `distance_edges`. ValueError when batch_size is below 1, there are no answers or none
    beyond the window, or a distance lies outside of edges.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1 document")
    covering = distance_edges(recall_set, window)
    edges_E = torch.tensor(covering if edges is None else list(edges))
    distance_A = recall_set.distance_NT[recall_set.answer_NT]
    bucket_A = torch.bucketize(distance_A, edges_E, right=True) - 1
    if (
        bool((edges_E.diff() <= 0).any())
        or int(bucket_A.min()) < 0
        or int(bucket_A.max()) >= len(edges_E) - 1
    ):
        raise ValueError(
            f"edges are {edges_E.tolist()}; they must increase and cover the distances {int(distance_A.min())} to "
            f"{int(distance_A.max())} (the last border is excluded)"
        )
    correct_A = _correct(model, recall_set, batch_size)
    by_distance = []
    for bucket, (low, high) in enumerate(zip(edges_E.tolist(), edges_E[1:].tolist(), strict=False)):
        inside_A = bucket_A == bucket
        if inside_A.any():
            count = int(inside_A.sum())
            by_distance.append(
                {"low": low, "high": high, "accuracy": _mean(correct_A[inside_A]), "count": count}
            )
    return Recall(
        beyond=None if window is None else _mean(correct_A[distance_A >= window]),
        overall=_mean(correct_A),
        by_distance=by_distance,
    )


def _correct(model: nn.Module, recall_set: RecallSet, batch_size: int) -> Tensor:
    """Return bool [A], in the order of recall_set.tokens_NT[recall_set.answer_NT]."""
    correct: list[Tensor] = []
    with evaluation_mode(model), torch.inference_mode():
        for tokens_BT, answer_BT in zip(
            recall_set.tokens_NT.split(batch_size), recall_set.answer_NT.split(batch_size), strict=True
        ):
            inputs_BT = tokens_BT[:, :-1]
            positions_BT = torch.arange(inputs_BT.shape[1]).expand_as(inputs_BT)
            logits_BTV = next_token_logits(model, inputs_BT, positions_BT)
            # An answer at t is predicted from the tokens before t, that is, by the logits at t - 1.
            asked_BT = answer_BT[:, 1:]
            choice_A = logits_BTV[asked_BT.to(logits_BTV.device)].argmax(dim=-1).cpu()
            correct.append(choice_A == tokens_BT[:, 1:][asked_BT])
    return torch.cat(correct)


def _check_window(distance_A: Tensor, window: int | None) -> None:
    if window is None:
        return
    if window < 1:
        raise ValueError(
            f"window is {window}; it must be at least 1 token, or None when no attention has a window"
        )
    largest = int(distance_A.max())
    if largest < window:
        raise ValueError(
            f"no answer of the recall set lies beyond the window of {window} tokens (the farthest is {largest} back); "
            "ask for more pairs in a document, or a shorter window"
        )


def _mean(correct_A: Tensor) -> float:
    return correct_A.double().mean().item()
