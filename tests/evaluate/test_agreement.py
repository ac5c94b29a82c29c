"""KL and agreement against the dense formula."""

import pytest
import torch
from torch.nn import functional

from trihybrid.evaluate import agreement
from trihybrid.evaluate.agreement import AgreementMeter
from trihybrid.evaluate.scoring import Scores


def test_equals_dense_formula(bigram, batches) -> None:
    student, teacher = bigram(1), bigram(2)
    result = agreement(student, teacher, batches)
    inputs = torch.cat([batch.inputs[batch.targets != -100] for batch in batches])
    log_s, log_t = (torch.log_softmax(model.table[inputs].double(), dim=-1) for model in (student, teacher))
    assert result.tokens == 18
    assert result.kl == pytest.approx(
        functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean").item(), rel=1e-5
    )
    assert result.teacher_entropy == pytest.approx(-(log_t.exp() * log_t).sum(-1).mean().item(), rel=1e-5)
    assert result.top1 == (log_s.argmax(-1) == log_t.argmax(-1)).double().mean().item()


def test_is_forward_not_reverse(fake, batches) -> None:
    # Teacher certain of two tokens, student spread: KL(T || S) = ln(260 / 2); the reverse would be large.
    sharp = torch.full((260,), -1000.0)
    sharp[:2] = 0.0
    teacher = fake(lambda ids, positions: sharp.expand(*ids.shape, 260))
    student = fake(lambda ids, positions: torch.zeros(*ids.shape, 260))
    result = agreement(student, teacher, batches)
    assert result.kl == pytest.approx(torch.tensor(130.0).log().item(), rel=1e-6)
    assert result.teacher_entropy == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)


def test_a_model_agrees_with_itself(bigram, batches) -> None:
    result = agreement(bigram(1), bigram(1), batches)
    assert (result.kl, result.top1) == (0.0, 1.0)


def test_half_of_the_choices(fake, batches) -> None:
    # First choice 5 on both sides at even positions; 5 against 6 at odd ones.
    def student(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return functional.one_hot(5 + positions % 2, 260).double()

    teacher = fake(lambda ids, positions: functional.one_hot(torch.full_like(ids, 5), 260).double())
    even = sum(int((batch.positions[batch.targets != -100] % 2 == 0).sum()) for batch in batches)
    assert agreement(fake(student), teacher, batches).top1 == even / 18


def test_needs_a_teacher() -> None:
    zero = torch.zeros(1)
    alone = Scores(zero, zero.long(), None, zero, zero, zero.bool())
    with pytest.raises(ValueError, match="needs scores with a teacher"):
        AgreementMeter().add(alone)
