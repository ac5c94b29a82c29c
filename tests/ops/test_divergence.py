"""Softcapped divergence and cross-entropy against the dense formula by autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from trihybrid.ops.divergence import (
    compare_distributions,
    dense_divergence,
    softcapped_cross_entropy,
    softcapped_divergence,
)
from trihybrid.ops.softcap import softcap
from trihybrid.testing import relative_error
from trihybrid.testing.live import live_tensors

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def make(
    tokens: int, vocabulary: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    teacher = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    # Logits of order one: a loss near zero is a difference of numbers near one, which float32 has not to 1e-5.
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) / width**0.5
    return student.to(dtype).requires_grad_(), teacher.to(dtype), head.to(dtype).requires_grad_()


def dense(
    student: Tensor,
    teacher: Tensor,
    head: Tensor,
    cap: float | None,
    temperature: float = 1.0,
    allowed: Tensor | None = None,
    weight: Tensor | None = None,
    teacher_head: Tensor | None = None,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in float64, as weighted means."""
    teacher_head = (head if teacher_head is None else teacher_head).detach().double()
    exact = dense_divergence(
        student.double(), teacher.double(), head.double(), cap, temperature, allowed, top_k, teacher_head
    )
    weight = torch.ones(len(student)) if weight is None else weight
    weight = weight.double() / weight.double().sum()
    return exact.kl_N @ weight, exact.entropy_N @ weight, exact.same_N.double() @ weight


@given(
    tokens=st.integers(1, 20),
    vocabulary=st.integers(2, 40),
    width=st.integers(1, 9),
    cap=st.sampled_from([None, 1.5, 30.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    chunk=st.integers(1, 24),
    filtered=st.booleans(),
    weighted=st.booleans(),
    block=st.integers(1, 44),
    top_k=st.none() | st.integers(1, 44),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_equals_dense(
    tokens: int,
    vocabulary: int,
    width: int,
    cap: float | None,
    temperature: float,
    chunk: int,
    filtered: bool,
    weighted: bool,
    block: int,
    top_k: int | None,
    dtype: torch.dtype,
) -> None:
    student, teacher, head = make(tokens, vocabulary, width, dtype=dtype)
    generator = torch.Generator().manual_seed(tokens)
    allowed = torch.randperm(vocabulary, generator=generator)[: (vocabulary + 1) // 2] if filtered else None
    weight = torch.randint(0, 3, (tokens,), generator=generator).float() + 0.5 if weighted else None
    if weight is not None:
        weight[1:][weight[1:] == 0.5] = 0.0
    result = softcapped_divergence(
        student, teacher, head, cap, temperature, allowed, weight, chunk, top_k=top_k, block=block
    )
    kl, entropy, agreement = dense(student, teacher, head, cap, temperature, allowed, weight, top_k=top_k)
    gradients = torch.autograd.grad(3 * result.kl, (student, head))
    expected = torch.autograd.grad(3 * kl, (student, head))
    assert result.kl.dtype == dtype
    for value, reference in zip(
        (result.kl, result.entropy_teacher, result.agreement, *gradients),
        (kl, entropy, agreement, *expected),
        strict=True,
    ):
        assert relative_error(value, reference) <= TOLERANCE[dtype]


@given(
    tokens=st.integers(2, 20),
    vocabulary=st.integers(2, 40),
    cap=st.sampled_from([None, 1.5, 30.0]),
    chunk=st.integers(1, 24),
    block=st.integers(1, 44),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@settings(deadline=None, max_examples=20, derandomize=True)
def test_cross_entropy_equals_dense(
    tokens: int, vocabulary: int, cap: float | None, chunk: int, block: int, dtype: torch.dtype
) -> None:
    hidden, _, head = make(tokens, vocabulary, 5, dtype=dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))
    targets[1::3] = -100
    loss = softcapped_cross_entropy(hidden, head, targets, cap, chunk, block)
    reference = functional.cross_entropy(softcap(hidden.double() @ head.double().T, cap), targets)
    gradients = torch.autograd.grad(loss, (hidden, head))
    expected = torch.autograd.grad(reference, (hidden, head))
    for value, wanted in zip((loss, *gradients), (reference, *expected), strict=True):
        assert relative_error(value, wanted) <= TOLERANCE[dtype]


def test_gradcheck() -> None:
    student, teacher, head = make(5, 7, 3)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    teacher_head = make(5, 7, 3, seed=1)[2].detach()

    def kl(student: Tensor, head: Tensor) -> Tensor:
        return softcapped_divergence(
            student, teacher, head, 2.0, 1.7, torch.tensor([6, 0, 3, 1]), weight, 2, teacher_head
        ).kl

    def cross_entropy(student: Tensor, head: Tensor) -> Tensor:
        return softcapped_cross_entropy(student, head, torch.tensor([1, -100, 6, 0, 2]), 2.0, 2)

    assert torch.autograd.gradcheck(kl, (student, head))
    assert torch.autograd.gradcheck(cross_entropy, (student, head))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_student_equal_to_teacher_scores_zero(dtype: torch.dtype) -> None:
    student, _, head = make(11, 23, 6, dtype=dtype)
    result = softcapped_divergence(student, student.detach().clone(), head, 3.0, 2.0, chunk=4)
    gradient_student, gradient_head = torch.autograd.grad(result.kl, (student, head))
    assert result.kl.item() == 0.0
    assert result.agreement.item() == pytest.approx(1.0, abs=1e-6)
    assert gradient_student.abs().max().item() == 0.0
    assert gradient_head.abs().max().item() == 0.0


def test_known_numbers() -> None:
    # Two tokens, logits (ln 3, 0) against (0, 0): KL = sum p log(2 p) with p = (3/4, 1/4).
    teacher = torch.tensor([[3.0]], dtype=torch.float64).log()
    head = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    result = softcapped_divergence(torch.zeros(1, 1, dtype=torch.float64), teacher, head, None)
    expected = (
        0.75 * torch.tensor(1.5, dtype=torch.float64).log()
        + 0.25 * torch.tensor(0.5, dtype=torch.float64).log()
    )
    assert result.kl.item() == pytest.approx(expected.item(), rel=1e-12)
    assert softcap(torch.tensor([1e9, -1e9, 0.0]), 30.0).tolist() == [30.0, -30.0, 0.0]


def test_temperature_gradient_is_not_rescaled() -> None:
    # At a high temperature KL and its gradient fall as 1 / T^2; a T^2 factor would keep them level.
    student, teacher, head = make(6, 9, 4)
    gradients = [
        torch.autograd.grad(softcapped_divergence(student, teacher, head, None, t).kl, student)[0]
        .norm()
        .item()
        for t in (1000.0, 2000.0)
    ]
    assert gradients[0] / gradients[1] == pytest.approx(4.0, rel=2e-2)


def test_chunk_size_changes_nothing() -> None:
    student, teacher, head = make(17, 13, 5)
    results = []
    for chunk in (1, 5, 17, 1000):
        kl = softcapped_divergence(student, teacher, head, 4.0, chunk=chunk).kl
        results.append((kl, *torch.autograd.grad(kl, (student, head))))
    for other in results[1:]:
        for value, reference in zip(other, results[0], strict=True):
            assert relative_error(value, reference) <= 1e-13


@pytest.mark.parametrize("top_k", [None, 3])
def test_vocabulary_blocks_change_nothing(top_k: int | None) -> None:
    """One block of all, whose logits are kept, and blocks whose logits are computed twice."""
    student, teacher, head = make(6, 13, 5)
    results = []
    for block in (16384, 4, 1):
        kl = softcapped_divergence(student, teacher, head, 4.0, chunk=4, block=block, top_k=top_k).kl
        results.append((kl, *torch.autograd.grad(kl, (student, head))))
    for other in results[1:]:
        for value, reference in zip(other, results[0], strict=True):
            assert relative_error(value, reference) <= 1e-13


def test_the_bucket_by_hand() -> None:
    """Four tokens of probability 1/2, 1/4, 1/8, 1/8 against 1/4 each: two alone, and 1/4 against 1/2 in the bucket."""
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    head = torch.eye(4, dtype=torch.float64)
    student = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    result = softcapped_divergence(student, teacher, head, None, top_k=2, block=3)
    assert result.kl.item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), rel=1e-12)
    assert result.entropy_teacher.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4), rel=1e-12)
    (gradient,) = torch.autograd.grad(result.kl, student)
    # p_S - p_T for the two; the bucket's 1/2 - 1/4 in the shares that the student gives its tokens.
    assert gradient.tolist()[0] == pytest.approx([-0.25, 0.0, 0.125, 0.125], abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bucket_of_next_to_nothing_has_digits(dtype: torch.dtype) -> None:
    """The student gives 1e-9 to what the teacher gives 1e-6: one minus the others' sum would be noise."""
    log_teacher, log_student = ([[0.0, rest, rest - 1]] for rest in (math.log(1e-6), math.log(1e-9)))
    student = torch.tensor(log_student, dtype=dtype, requires_grad=True)
    head = torch.eye(3, dtype=dtype)
    arguments = torch.tensor(log_teacher, dtype=dtype), head, None
    result = softcapped_divergence(student, *arguments, top_k=1, block=2)
    wide = student.detach().double().requires_grad_()
    kl = dense(wide, *arguments, top_k=1)[0]
    (gradient,), (expected,) = torch.autograd.grad(result.kl, student), torch.autograd.grad(kl, wide)
    # Of the bucket's tokens: that of the other is a difference of numbers next to one, in the formula too.
    assert relative_error(gradient[:, 1:], expected[:, 1:]) <= TOLERANCE[dtype]
    assert result.kl.item() == pytest.approx(kl.item(), rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_teacher_of_another_width() -> None:
    student, _, head = make(6, 9, 4)
    _, teacher, teacher_head = make(6, 9, 7, seed=3)
    result = softcapped_divergence(student, teacher, head, 5.0, teacher_head_VD=teacher_head, chunk=4)
    kl, entropy, _ = dense(student, teacher, head, 5.0, teacher_head=teacher_head)
    assert relative_error(result.kl, kl) <= 1e-12
    assert relative_error(result.entropy_teacher, entropy) <= 1e-12
    result.kl.backward()
    assert teacher_head.grad is None


def test_no_gradient_to_the_teacher() -> None:
    student, teacher, head = make(4, 6, 3)
    teacher.requires_grad_()
    result = softcapped_divergence(student, teacher, head, 5.0)
    assert not result.entropy_teacher.requires_grad
    assert not result.agreement.requires_grad
    result.kl.backward()
    assert teacher.grad is None


def test_masked_rows_may_hold_anything() -> None:
    student, teacher, head = make(6, 9, 4)
    keep = torch.tensor([True, False, True, True, False, True])
    poisoned = torch.where(keep.unsqueeze(1), student.detach(), torch.nan).requires_grad_()
    masked = softcapped_divergence(
        poisoned, teacher.where(keep.unsqueeze(1), torch.nan), head, 5.0, weight_N=keep
    )
    kept = softcapped_divergence(student.detach()[keep], teacher[keep], head, 5.0)
    assert masked.kl.item() == kept.kl.item()
    (gradient,) = torch.autograd.grad(masked.kl, poisoned)
    assert gradient[~keep].abs().max().item() == 0.0
    assert gradient[keep].isfinite().all()


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    student, teacher, head = make(12, 31, 8, dtype=torch.bfloat16)
    result = softcapped_divergence(student, teacher, head, 30.0, chunk=5)
    wide = softcapped_divergence(student.float(), teacher.float(), head.float(), 30.0, chunk=5)
    assert result.kl.dtype == torch.float32
    assert result.kl.item() == wide.kl.item()
    (gradient,) = torch.autograd.grad(result.kl, student)
    assert gradient.dtype == torch.bfloat16
    kl, _, _ = dense(student, teacher, head, 30.0)
    assert relative_error(gradient, torch.autograd.grad(kl, student)[0]) <= 1e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = softcapped_divergence(student.float(), teacher.float(), head.float(), 30.0, chunk=5)
    assert under.kl.item() == wide.kl.item()


@pytest.mark.parametrize("top_k", [None, 4])
def test_memory_is_three_tables_of_a_chunk_and_a_block(top_k: int | None) -> None:
    """Counted over forward and backward of a frozen head: no table of [N, V] nor of [chunk, V], whatever N and V are.
    Beside the tables: the gradient of the hidden states, and the teacher's choice."""
    tokens, vocabulary, width, chunk, block = 128, 4096, 16, 32, 512
    student, teacher, head = make(tokens, vocabulary, width, dtype=torch.float32)
    table, hidden = 4 * chunk * block, 4 * tokens * width
    with live_tensors() as live:
        kl = softcapped_divergence(
            student, teacher, head.detach(), 30.0, chunk=chunk, top_k=top_k, block=block
        ).kl
        assert live.bytes <= 2 * hidden
        kl.backward()
    assert live.largest == table
    assert live.peak <= (3 + 0.6) * table + 2 * hidden


def test_memory_of_cross_entropy_is_two_tables() -> None:
    tokens, vocabulary, width, chunk, block = 128, 4096, 16, 32, 512
    hidden, _, head = make(tokens, vocabulary, width, dtype=torch.float32)
    with live_tensors() as live:
        softcapped_cross_entropy(hidden, head.detach(), torch.arange(tokens), 5.0, chunk, block).backward()
    assert live.largest == 4 * chunk * block
    assert live.peak <= 2.6 * 4 * chunk * block


def test_a_frozen_head_costs_nothing() -> None:
    """No gradient of its size is ever made, and a block of it at most is cast to float32."""
    student, teacher, head = make(8, 4096, 64, dtype=torch.bfloat16)
    with live_tensors() as live:
        softcapped_divergence(student, teacher, head.detach(), 30.0, chunk=8, block=256).kl.backward()
    assert live.largest == 4 * 256 * 64
    with live_tensors() as live:
        softcapped_divergence(student, teacher, head, 30.0, chunk=8, block=256).kl.backward()
    assert live.largest == 4 * 4096 * 64


def test_second_derivative_is_refused_and_graph_can_be_kept() -> None:
    student, teacher, head = make(4, 6, 3)
    kl = softcapped_divergence(student, teacher, head, 5.0).kl
    first = torch.autograd.grad(kl, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(kl, student, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kl, student, create_graph=True)


def test_without_gradients() -> None:
    student, teacher, head = make(4, 6, 3)
    wanted = softcapped_divergence(student, teacher, head, 5.0).kl
    with torch.no_grad():
        value = softcapped_divergence(student, teacher, head, 5.0).kl
    assert not value.requires_grad
    assert value.item() == wanted.item()


def test_compare_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    log_t, log_s = torch.log_softmax(torch.randn(2, 5, 9, generator=generator, dtype=torch.float64), dim=-1)
    comparison = compare_distributions(log_t, log_s)
    reference = functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(comparison.kl_N, reference, rtol=1e-12)
    assert torch.allclose(
        comparison.entropy_N, torch.distributions.Categorical(logits=log_t).entropy(), rtol=1e-12
    )
    assert comparison.same_N.tolist() == [log_t[i].argmax() == log_s[i].argmax() for i in range(5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"block": 0}, "block is 0; it must be at least 1 token of the vocabulary"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1 token, or None"),
        ({"weight_N": torch.zeros(4)}, "no token has a weight: all 4"),
        ({"weight_N": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "negative or non-finite"),
        ({"weight_N": torch.tensor([1.0, torch.nan, 1.0, 1.0])}, "negative or non-finite"),
        ({"weight_N": torch.ones(3)}, r"weight_N has shape \[3\]"),
        ({"allowed_V": torch.tensor([0, 0])}, "repeats a token id"),
        ({"allowed_V": torch.tensor([6])}, r"\[0, 6\)"),
        ({"allowed_V": torch.tensor([], dtype=torch.int64)}, "at least one token id"),
        ({"teacher_hidden_ND": torch.zeros(3, 3)}, "3 tokens and student_hidden_ND 4"),
        ({"teacher_head_VD": torch.zeros(5, 3)}, "one vocabulary"),
        ({"student_hidden_ND": torch.zeros(2, 2, 3)}, "flatten batch and time"),
        ({"head_VD": torch.zeros(6, 3, dtype=torch.int64)}, "floating dtype"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "student_hidden_ND": torch.zeros(4, 3),
        "teacher_hidden_ND": torch.zeros(4, 3),
        "head_VD": torch.zeros(6, 3),
        "softcap": 30.0,
    }
    with pytest.raises(ValueError, match=message):
        softcapped_divergence(**{**arguments, **change})


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.full((4,), -100), "no token has a weight"),
        (torch.tensor([0, 1, 6, -100]), "spans 0 to 6"),
        (torch.tensor([0, 1, -1, -100]), "spans -1 to 1"),
        (torch.tensor([0, 1, 2]), "one for each row"),
        (torch.zeros(4), "must be int64"),
    ],
)
def test_bad_targets_are_named(targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        softcapped_cross_entropy(torch.zeros(4, 3), torch.zeros(6, 3), targets)
