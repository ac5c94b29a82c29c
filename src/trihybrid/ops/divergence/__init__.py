"""Losses between distributions over the vocabulary, without the logits of all tokens at once.

The head is multiplied, softcapped and normalised for a chunk of tokens and a block of the vocabulary at a time, and the
gradient is taken in the same pass (the "fused linear" trick of Liger Kernel, https://arxiv.org/abs/2410.10989, with the
vocabulary in blocks as in https://arxiv.org/abs/2411.09009, and here with a softcap on both sides): see `chunks` for
what that keeps in memory, `definition` for what it computes.

Shapes: N tokens, V vocabulary, A allowed vocabulary, D model width (the student's and the teacher's may differ where
each has its own head).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trihybrid.ops.divergence.checks import (
    check_hidden,
    check_sizes,
    checked_allowed,
    compute_dtype,
    kept_weights,
)
from trihybrid.ops.divergence.chunks import chunked_mean
from trihybrid.ops.divergence.definition import (
    IGNORED_TARGET,
    Comparison,
    compare_distributions,
    dense_divergence,
)
from trihybrid.ops.divergence.tables import Head, Shaping
from trihybrid.ops.divergence.targets import TeacherTarget, TokenTarget, TopTarget
from trihybrid.ops.softcap import check_softcap

__all__ = [
    "IGNORED_TARGET",
    "VOCABULARY_BLOCK",
    "Comparison",
    "Divergence",
    "compare_distributions",
    "dense_divergence",
    "softcapped_cross_entropy",
    "softcapped_divergence",
]

VOCABULARY_BLOCK = 16384
"""Columns of a table, and rows of the head that are cast to the compute dtype at once where they have to be."""


@dataclass(frozen=True)
class Divergence:
    """What `softcapped_divergence` measures; all are scalars of the compute dtype, weighted means over tokens.

    kl: forward KL(teacher || student), nats a token; the only one that carries a gradient.
    entropy_teacher: entropy of the teacher's distribution, nats a token (cross-entropy = kl + entropy_teacher).
    agreement: fraction in [0, 1] of tokens whose most likely token is the same on both sides.
    """

    kl: Tensor
    entropy_teacher: Tensor
    agreement: Tensor


def softcapped_divergence(
    student_hidden_ND: Tensor,
    teacher_hidden_ND: Tensor,
    head_VD: Tensor,
    softcap: float | None,
    temperature: float = 1.0,
    allowed_V: Tensor | None = None,
    weight_N: Tensor | None = None,
    chunk: int = 1024,
    teacher_head_VD: Tensor | None = None,
    top_k: int | None = None,
    block: int = VOCABULARY_BLOCK,
) -> Divergence:
    """Forward KL(p_T || p_S) with p = softmax(cap * tanh(hidden @ head^T / cap) / temperature) on both sides.

    student_hidden_ND, teacher_hidden_ND: [N, D], what each model feeds its head (after the final norm).
    head_VD: [V, D], the student's head; the teacher's too unless teacher_head_VD is given.
    softcap: above zero, or None for plain logits.
    temperature: above zero. The value is the plain KL of the two tempered distributions; the factor temperature^2
        of Hinton et al. (2015) is not applied, neither to the value nor to the gradient.
    allowed_V: [A] distinct token ids; both distributions are restricted to them and renormalised.
    weight_N: [N], bool or number >= 0, a constant; means are sum(w x) / sum(w). Tokens of weight 0 are never
        computed, so padding may hold anything.
    chunk, block: tokens and columns of the vocabulary at a time, at least 1.
    top_k: compare the teacher's top_k most likely (allowed) tokens, and the probability of all others as one bucket;
        None compares all. Agreement is that of the whole distributions.

    Logits are float64 when an input is float64 and float32 otherwise, also under autocast; sums over tokens are
    float64. Half precision on a GPU is multiplied as it is with float32 sums, and a logit's gradient is rounded to it
    once.
    Gradients flow to student_hidden_ND and, through the student's side only, to head_VD where it wants one; none to the
    teacher. ValueError for a shape, id, weight, softcap, temperature, chunk, block or top_k outside of these, or no
    weight at all; RuntimeError in a backward with create_graph=True (there is no second derivative).
    """
    teacher_head_VD = head_VD if teacher_head_VD is None else teacher_head_VD
    check_softcap(softcap)
    check_sizes(chunk, block, top_k)
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}; it must be above 0 (1 leaves the distributions as they are)"
        )
    check_hidden("student_hidden_ND", student_hidden_ND, "head_VD", head_VD)
    check_hidden("teacher_hidden_ND", teacher_hidden_ND, "teacher_head_VD", teacher_head_VD)
    tokens = student_hidden_ND.shape[0]
    if teacher_hidden_ND.shape[0] != tokens:
        raise ValueError(
            f"teacher_hidden_ND has {teacher_hidden_ND.shape[0]} tokens and student_hidden_ND {tokens}; pass the same "
            "tokens to both models"
        )
    if teacher_head_VD.shape[0] != head_VD.shape[0]:
        raise ValueError(
            f"teacher_head_VD has {teacher_head_VD.shape[0]} tokens in its vocabulary and head_VD {head_VD.shape[0]}; "
            "a divergence needs one vocabulary"
        )
    dtype = compute_dtype(student_hidden_ND, teacher_hidden_ND, head_VD, teacher_head_VD)
    kept, weight_N = kept_weights(weight_N, tokens, student_hidden_ND.device, dtype)
    if kept is not None:
        student_hidden_ND, teacher_hidden_ND = student_hidden_ND[kept], teacher_hidden_ND[kept]
    allowed_A = None if allowed_V is None else checked_allowed(allowed_V, head_VD)
    shaping = Shaping(softcap, temperature)
    teacher_head = Head(teacher_head_VD, allowed_A, block, dtype)
    target = (
        TeacherTarget(teacher_hidden_ND.detach(), teacher_head, shaping)
        if top_k is None
        else TopTarget(teacher_hidden_ND.detach(), teacher_head, shaping, top_k)
    )
    head = Head(head_VD, allowed_A, block, dtype)
    kl = chunked_mean(student_hidden_ND, head_VD, head, weight_N, target, chunk)
    entropy, agreement = (
        (number_N * weight_N).sum().to(dtype) for number_N in (target.entropy_N, target.same_N)
    )
    return Divergence(kl=kl, entropy_teacher=entropy, agreement=agreement)


def softcapped_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    softcap: float | None = None,
    chunk: int = 1024,
    block: int = VOCABULARY_BLOCK,
) -> Tensor:
    """Mean cross-entropy in nats of softmax(cap * tanh(hidden @ head^T / cap)) against token ids; a scalar.

    hidden_ND: [N, D]; head_VD: [V, D]; targets_N: [N] int64 in [0, V), or -100 for a token that does not count.
    Precision, memory and gradients (to hidden_ND and head_VD) are those of `softcapped_divergence`.
    ValueError for a shape, target, softcap, chunk or block outside of these, or when every target is -100.
    """
    check_softcap(softcap)
    check_sizes(chunk, block, None)
    check_hidden("hidden_ND", hidden_ND, "head_VD", head_VD)
    if targets_N.dtype != torch.int64 or targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"targets_N is {targets_N.dtype} {list(targets_N.shape)}; it must be int64 [{hidden_ND.shape[0]}], "
            "one for each row of hidden_ND"
        )
    dtype = compute_dtype(hidden_ND, head_VD)
    kept, weight_N = kept_weights(targets_N != IGNORED_TARGET, len(targets_N), hidden_ND.device, dtype)
    if kept is not None:
        hidden_ND, targets_N = hidden_ND[kept], targets_N[kept]
    low, high = int(targets_N.min()), int(targets_N.max())
    if low < 0 or high >= head_VD.shape[0]:
        raise ValueError(
            f"targets_N spans {low} to {high}; targets lie in [0, {head_VD.shape[0]}), the rows of head_VD, and -100 "
            "marks one that does not count"
        )
    head = Head(head_VD, None, block, dtype)
    target = TokenTarget(hidden_ND.detach(), head, Shaping(softcap, 1.0), targets_N)
    return chunked_mean(hidden_ND, head_VD, head, weight_N, target, chunk)
