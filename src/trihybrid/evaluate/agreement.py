"""How close a student's predictions are to its teacher's: forward KL and equal first choices."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from trihybrid.data import Batch
from trihybrid.evaluate.scoring import Scores, score


@dataclass(frozen=True)
class Agreement:
    """Means over the tokens that count.

    kl: forward KL(teacher || student), nats a token. top1: fraction in [0, 1] with the same most likely token.
    teacher_entropy: nats a token. tokens: how many.
    """

    kl: float
    top1: float
    teacher_entropy: float
    tokens: int


class AgreementMeter:
    """Sums KL, entropy and equal first choices in float64."""

    def __init__(self) -> None:
        self.kl = 0.0
        self.entropy = 0.0
        self.same = 0
        self.tokens = 0

    def add(self, scores: Scores) -> None:
        """Add one chunk; ValueError when it was scored without a teacher."""
        comparison = scores.comparison
        if comparison is None:
            raise ValueError("agreement needs scores with a teacher; pass teacher to score")
        self.kl += comparison.kl_N.double().sum().item()
        self.entropy += comparison.entropy_N.double().sum().item()
        self.same += int(comparison.same_N.sum())
        self.tokens += len(comparison.kl_N)

    def result(self) -> Agreement:
        """Return the means over everything added (at least one chunk)."""
        return Agreement(
            self.kl / self.tokens, self.same / self.tokens, self.entropy / self.tokens, self.tokens
        )


def agreement(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch]) -> Agreement:
    """Forward KL and top-1 agreement of student with teacher over batches, from their (softcapped) logits.

    ValueError when the vocabularies differ or no target counts.
    """
    meter = AgreementMeter()
    score(student, batches, [meter], teacher=teacher)
    return meter.result()
