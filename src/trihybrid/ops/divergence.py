"""Losses between distributions over the vocabulary, without the logits of all tokens at once.

The head is multiplied, softcapped and normalised for a chunk of tokens at a time, and the gradient is taken in the
same pass, so that the memory is O(chunk * V) in the forward and nothing with V columns waits for the backward
(the "fused linear" trick of Liger Kernel, https://arxiv.org/abs/2410.10989, here with a softcap on both sides).

Shapes: N tokens, C tokens of one chunk, V vocabulary, A allowed vocabulary, D model width (the student's and the
teacher's may differ when each has its own head).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_TARGET = -100
# Rows of the head that are cast to the compute dtype at once: a bfloat16 head never exists whole in float32.
VOCABULARY_BLOCK = 16384

# score(rows, log_student_CV, error_CV) -> loss_C. error_CV holds the student's probabilities on entry, and the score
# subtracts the target distribution from it in place; it is None when no gradient is wanted.
Score = Callable[[slice, Tensor, Tensor | None], Tensor]


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


@dataclass(frozen=True)
class Comparison:
    """`compare_distributions` for each token: kl_N and entropy_N in nats, same_N bool (equal argmax)."""

    kl_N: Tensor
    entropy_N: Tensor
    same_N: Tensor


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(logits / cap) (Gemma's final logit softcapping), or the logits when cap is None.

    Shape and dtype are kept; differentiable. ValueError when cap is not above zero.
    """
    _check_softcap(cap)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def compare_distributions(log_teacher_NV: Tensor, log_student_NV: Tensor) -> Comparison:
    """Compare two tables of log-probabilities row by row: KL(T || S) = sum_v p_T (log p_T - log p_S).

    Both are [N, V], normalised, of one floating dtype. Dense: the caller chunks over tokens.
    """
    return _compare(log_teacher_NV, log_teacher_NV.exp(), log_student_NV)


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
    chunk: tokens at a time, at least 1.

    Logits and log-probabilities are float64 when an input is float64 and float32 otherwise, also under autocast.
    Gradients flow to student_hidden_ND and, through the student's side only, to head_VD; none to the teacher.
    ValueError for a shape, id, weight, softcap, temperature or chunk outside of these, or no weight at all;
    RuntimeError in a backward with create_graph=True (there is no second derivative).
    """
    teacher_head_VD = head_VD if teacher_head_VD is None else teacher_head_VD
    _check_softcap(softcap)
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}; it must be above 0 (1 leaves the distributions as they are)"
        )
    _check_hidden("student_hidden_ND", student_hidden_ND, "head_VD", head_VD)
    _check_hidden("teacher_hidden_ND", teacher_hidden_ND, "teacher_head_VD", teacher_head_VD)
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
    dtype = _compute_dtype(student_hidden_ND, teacher_hidden_ND, head_VD, teacher_head_VD)
    kept, weight_N = _kept_weights(weight_N, tokens, student_hidden_ND.device, dtype)
    if kept is not None:
        student_hidden_ND, teacher_hidden_ND = student_hidden_ND[kept], teacher_hidden_ND[kept]
    teacher_hidden_ND, teacher_head_VD = teacher_hidden_ND.detach(), teacher_head_VD.detach()
    if allowed_V is not None:
        allowed_V = _checked_allowed(allowed_V, head_VD)
        head_VD, teacher_head_VD = head_VD[allowed_V], teacher_head_VD[allowed_V]

    entropy_N = torch.empty_like(weight_N)
    same_N = torch.empty_like(weight_N)

    def score(rows: slice, log_student_CV: Tensor, error_CV: Tensor | None) -> Tensor:
        # The tanh is dropped here and not at the end: a table of [C, V] less while the rest is computed.
        log_teacher_CV = _log_probabilities(
            teacher_hidden_ND[rows], teacher_head_VD, softcap, temperature, dtype
        )[0]
        teacher_CV = log_teacher_CV.exp()
        if error_CV is not None:
            error_CV.sub_(teacher_CV)
        comparison = _compare(log_teacher_CV, teacher_CV, log_student_CV)
        entropy_N[rows] = comparison.entropy_N
        same_N[rows] = comparison.same_N.to(dtype)
        return comparison.kl_N

    kl = _chunked_mean(student_hidden_ND, head_VD, weight_N, score, softcap, temperature, chunk, dtype)
    return Divergence(
        kl=kl, entropy_teacher=(entropy_N * weight_N).sum(), agreement=(same_N * weight_N).sum()
    )


def softcapped_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, softcap: float | None = None, chunk: int = 1024
) -> Tensor:
    """Mean cross-entropy in nats of softmax(cap * tanh(hidden @ head^T / cap)) against token ids; a scalar.

    hidden_ND: [N, D]; head_VD: [V, D]; targets_N: [N] int64 in [0, V), or -100 for a token that does not count.
    Precision, memory and gradients (to hidden_ND and head_VD) are those of `softcapped_divergence`.
    ValueError for a shape, target, softcap or chunk outside of these, or when every target is -100.
    """
    _check_softcap(softcap)
    _check_hidden("hidden_ND", hidden_ND, "head_VD", head_VD)
    if targets_N.dtype != torch.int64 or targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"targets_N is {targets_N.dtype} {list(targets_N.shape)}; it must be int64 [{hidden_ND.shape[0]}], "
            "one for each row of hidden_ND"
        )
    dtype = _compute_dtype(hidden_ND, head_VD)
    kept, weight_N = _kept_weights(targets_N != IGNORED_TARGET, len(targets_N), hidden_ND.device, dtype)
    if kept is not None:
        hidden_ND, targets_N = hidden_ND[kept], targets_N[kept]
    low, high = int(targets_N.min()), int(targets_N.max())
    if low < 0 or high >= head_VD.shape[0]:
        raise ValueError(
            f"targets_N spans {low} to {high}; targets lie in [0, {head_VD.shape[0]}), the rows of head_VD, and -100 "
            "marks one that does not count"
        )

    def score(rows: slice, log_student_CV: Tensor, error_CV: Tensor | None) -> Tensor:
        targets_C1 = targets_N[rows].unsqueeze(1)
        if error_CV is not None:
            error_CV.scatter_add_(1, targets_C1, -torch.ones_like(targets_C1, dtype=dtype))
        return -log_student_CV.gather(1, targets_C1).squeeze(1)

    return _chunked_mean(hidden_ND, head_VD, weight_N, score, softcap, 1.0, chunk, dtype)


def _chunked_mean(
    hidden_ND: Tensor,
    head_VD: Tensor,
    weight_N: Tensor,
    score: Score,
    softcap: float | None,
    temperature: float,
    chunk: int,
    dtype: torch.dtype,
) -> Tensor:
    """Sum of weight_N * score over the tokens, differentiable in hidden_ND and head_VD."""
    if chunk < 1:
        raise ValueError(
            f"chunk is {chunk}; it must be at least 1 token (1024 by default, less for less memory)"
        )
    # Known here only: inside a Function gradients are off, and needs_input_grad forgets torch.no_grad.
    learns = torch.is_grad_enabled()
    wanted = (learns and hidden_ND.requires_grad, learns and head_VD.requires_grad)
    # A forward under autocast would round the logits to bfloat16.
    with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
        return _ChunkedMean.apply(
            hidden_ND, head_VD, weight_N, score, softcap, temperature, chunk, dtype, wanted
        )


class _ChunkedMean(torch.autograd.Function):
    """The gradient of a scalar is known up to one factor in the forward; the backward applies that factor."""

    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        head_VD: Tensor,
        weight_N: Tensor,
        score: Score,
        softcap: float | None,
        temperature: float,
        chunk: int,
        dtype: torch.dtype,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        loss_N = torch.empty_like(weight_N)
        hidden_gradient_ND = torch.empty_like(hidden_ND, dtype=dtype) if wanted[0] else None
        head_gradient_VD = torch.zeros_like(head_VD, dtype=dtype) if wanted[1] else None
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_CD = hidden_ND[rows].to(dtype)
            log_student_CV, tanh_CV = _log_probabilities(hidden_CD, head_VD, softcap, temperature, dtype)
            error_CV = log_student_CV.exp() if any(wanted) else None
            loss_N[rows] = score(rows, log_student_CV, error_CV)
            if error_CV is None:
                continue
            # d loss / d (hidden @ head^T) = weight (p_S - target) / temperature * (1 - tanh^2)
            error_CV.mul_((weight_N[rows] / temperature).unsqueeze(1))
            if tanh_CV is not None:
                error_CV.mul_(tanh_CV.square_().neg_().add_(1))
            if hidden_gradient_ND is not None:
                hidden_gradient_ND[rows] = _times_head(error_CV, head_VD, dtype)
            if head_gradient_VD is not None:
                head_gradient_VD.addmm_(error_CV.T, hidden_CD)
        ctx.save_for_backward(hidden_gradient_ND, head_gradient_VD)
        ctx.dtypes = (hidden_ND.dtype, head_VD.dtype)
        return (loss_N * weight_N).sum()

    @staticmethod
    def backward(ctx, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable stays silent when loss_gradient is a constant, and the second derivative would be lost.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the chunked losses have no second derivative; call backward without create_graph=True"
            )
        gradients = [
            None if gradient is None else (gradient * loss_gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None, None, None, None)


def _log_probabilities(
    hidden_CD: Tensor, head_VD: Tensor, softcap: float | None, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(softcap(hidden @ head^T) / temperature), and tanh(logits / cap) when there is a cap."""
    hidden_CD = hidden_CD.to(dtype)
    logits_CV = hidden_CD.new_empty(hidden_CD.shape[0], head_VD.shape[0])
    for start in range(0, head_VD.shape[0], VOCABULARY_BLOCK):
        block = slice(start, start + VOCABULARY_BLOCK)
        logits_CV[:, block] = hidden_CD @ head_VD[block].to(dtype).T
    tanh_CV = None
    if softcap is not None:
        tanh_CV = logits_CV.div_(softcap).tanh_()
        logits_CV = tanh_CV * softcap
    return torch.log_softmax(logits_CV.div_(temperature), dim=-1), tanh_CV


def _times_head(error_CV: Tensor, head_VD: Tensor, dtype: torch.dtype) -> Tensor:
    product_CD = error_CV.new_zeros(error_CV.shape[0], head_VD.shape[1])
    for start in range(0, head_VD.shape[0], VOCABULARY_BLOCK):
        block = slice(start, start + VOCABULARY_BLOCK)
        product_CD.addmm_(error_CV[:, block], head_VD[block].to(dtype))
    return product_CD


def _compare(log_teacher_NV: Tensor, teacher_NV: Tensor, log_student_NV: Tensor) -> Comparison:
    return Comparison(
        kl_N=(teacher_NV * (log_teacher_NV - log_student_NV)).sum(dim=-1),
        entropy_N=-(teacher_NV * log_teacher_NV).sum(dim=-1),
        same_N=log_teacher_NV.argmax(dim=-1) == log_student_NV.argmax(dim=-1),
    )


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _kept_weights(
    weight_N: Tensor | None, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Return the rows of non-zero weight (None for all rows) and their weights divided by the sum."""
    if weight_N is None:
        weight_N = torch.ones(tokens, dtype=dtype, device=device)
    if weight_N.shape != (tokens,):
        raise ValueError(
            f"weight_N has shape {list(weight_N.shape)}; it must be [{tokens}], one for each token"
        )
    weight_N = weight_N.detach().to(dtype)
    if not bool((weight_N.isfinite() & (weight_N >= 0)).all()):
        raise ValueError("weight_N holds a negative or non-finite number; weights are finite and at least 0")
    kept = weight_N.nonzero().squeeze(1)
    if len(kept) == 0:
        raise ValueError(
            f"no token has a weight: all {tokens} are masked; drop this batch or check its targets"
        )
    if len(kept) == tokens:
        return None, weight_N / weight_N.sum()
    return kept, weight_N[kept] / weight_N.sum()


def _checked_allowed(allowed_V: Tensor, head_VD: Tensor) -> Tensor:
    vocabulary = head_VD.shape[0]
    if allowed_V.dtype != torch.int64 or allowed_V.dim() != 1 or len(allowed_V) == 0:
        raise ValueError(
            f"allowed_V is {allowed_V.dtype} {list(allowed_V.shape)}; it must be int64 [A] with at least one token id"
        )
    if int(allowed_V.min()) < 0 or int(allowed_V.max()) >= vocabulary:
        raise ValueError(
            f"allowed_V spans {int(allowed_V.min())} to {int(allowed_V.max())}; token ids lie in [0, {vocabulary})"
        )
    if len(allowed_V.unique()) != len(allowed_V):
        raise ValueError("allowed_V repeats a token id; each may be allowed once (use allowed_V.unique())")
    return allowed_V.to(head_VD.device)


def _check_softcap(cap: float | None) -> None:
    if cap is not None and not cap > 0:
        raise ValueError(f"softcap is {cap}; it must be above 0, or None for no softcap")


def _check_hidden(hidden_name: str, hidden_ND: Tensor, head_name: str, head_VD: Tensor) -> None:
    if hidden_ND.dim() != 2 or head_VD.dim() != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"{hidden_name} is {list(hidden_ND.shape)} and {head_name} {list(head_VD.shape)}; they must be [N, D] and "
            "[V, D] of one width D (flatten batch and time first)"
        )
    for name, tensor in ((hidden_name, hidden_ND), (head_name, head_VD)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be a floating dtype")
