"""What the losses are: distributions of softcapped logits, and their divergence with every logit at once.

Shapes: N tokens, V vocabulary, K tokens of the teacher's choice, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trihybrid.ops.softcap import softcap

IGNORED_TARGET = -100


@dataclass(frozen=True)
class Comparison:
    """Two distributions token by token: kl_N and entropy_N (the teacher's) in nats, same_N bool (equal argmax)."""

    kl_N: Tensor
    entropy_N: Tensor
    same_N: Tensor


def compare_distributions(log_teacher_NV: Tensor, log_student_NV: Tensor) -> Comparison:
    """Compare two tables of log-probabilities row by row: KL(T || S) = sum_v p_T (log p_T - log p_S).

    Both are [N, V], normalised, of one floating dtype. Dense: the caller chunks over tokens.
    """
    teacher_NV = log_teacher_NV.exp()
    return Comparison(
        kl_N=(teacher_NV * (log_teacher_NV - log_student_NV)).sum(dim=-1),
        entropy_N=-(teacher_NV * log_teacher_NV).sum(dim=-1),
        same_N=log_teacher_NV.argmax(dim=-1) == log_student_NV.argmax(dim=-1),
    )


def dense_divergence(
    student_hidden_ND: Tensor,
    teacher_hidden_ND: Tensor,
    head_VD: Tensor,
    cap: float | None,
    temperature: float = 1.0,
    allowed_V: Tensor | None = None,
    top_k: int | None = None,
    teacher_head_VD: Tensor | None = None,
) -> Comparison:
    """The definition of `softcapped_divergence`, token by token, by autograd and in the dtype of its inputs.

    p = softmax(cap * tanh(hidden @ head^T / cap) / temperature) on both sides, restricted to `allowed_V`; with `top_k`
    over the teacher's K = top_k most likely tokens and one bucket that holds the probability of all others.
    """
    logs = []
    for hidden_ND, weight_VD in (
        (teacher_hidden_ND, head_VD if teacher_head_VD is None else teacher_head_VD),
        (student_hidden_ND, head_VD),
    ):
        logits_NV = softcap(hidden_ND @ weight_VD.T, cap)
        logits_NV = logits_NV if allowed_V is None else logits_NV[:, allowed_V]
        logs.append(torch.log_softmax(logits_NV / temperature, dim=-1))
    whole = compare_distributions(*logs)
    if top_k is None or top_k >= logs[0].shape[1]:
        return whole
    chosen_NK = logs[0].topk(top_k, dim=-1).indices
    # logsumexp over an empty rest is minus infinity, and 0 log 0 has no value in floating point: hence the case above.
    bucketed = [
        torch.cat(
            [
                log_NV.gather(1, chosen_NK),
                log_NV.scatter(1, chosen_NK, -torch.inf).logsumexp(dim=-1, keepdim=True),
            ],
            dim=-1,
        )
        for log_NV in logs
    ]
    buckets = compare_distributions(*bucketed)
    return Comparison(buckets.kl_N, buckets.entropy_N, whole.same_N)
