"""One table of logits at a time: a block of the vocabulary for a chunk of tokens, what is summed up over the blocks,
and the gradient of a block.

    x = softcap(h . w) / temperature        log sum over the vocabulary of e^x = top + log(sum e^(x - top))
    dL/d(h . w) = (p_S - target) (1 - tanh^2(h . w / cap)) / temperature          tanh only where there is a cap

On a GPU two fused kernels do what is not a matrix product; in PyTorch it takes some passes over the table.

Shapes: C tokens of a chunk, B columns of a block, V vocabulary, A allowed vocabulary, D model width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shaping:
    """From a raw product to a log-probability, but for the norm: cap * tanh(raw / cap) / temperature."""

    cap: float | None
    temperature: float

    def apply_(self, raw_CB: Tensor) -> Tensor:
        """In place; the tensor itself."""
        if self.cap is None:
            return raw_CB if self.temperature == 1 else raw_CB.div_(self.temperature)
        return raw_CB.div_(self.cap).tanh_().mul_(self.cap / self.temperature)

    def slope(self, x: Tensor) -> Tensor:
        """d x / d raw, as a function of x."""
        if self.cap is None:
            return torch.full_like(x, 1 / self.temperature)
        return (1 - (x * (self.temperature / self.cap)) ** 2) / self.temperature


class Head:
    """A head in blocks of the vocabulary.

    Args:
        weight_VD: [V, D].
        allowed_A: the rows that count, or None for all.
        block: columns of a block.
        dtype: of tables and sums, float32 or float64. Half precision is multiplied as it is on a GPU, with float32
            sums and results; everywhere else a block of the head is cast before it is multiplied.
    """

    def __init__(self, weight_VD: Tensor, allowed_A: Tensor | None, block: int, dtype: torch.dtype) -> None:
        self.weight_VD, self.allowed_A, self.block, self.dtype = weight_VD.detach(), allowed_A, block, dtype
        self.size = len(weight_VD if allowed_A is None else allowed_A)

    def blocks(self) -> Iterator[slice]:
        """The columns [0, A), a block at a time."""
        for start in range(0, self.size, self.block):
            yield slice(start, min(start + self.block, self.size))

    def logits(self, hidden_CD: Tensor, columns: slice) -> Tensor:
        """hidden @ head^T for a block, a fresh [C, B] of `dtype`."""
        weight_BD = self._rows(columns)
        if self._multiplies_halves(hidden_CD):
            return torch.mm(hidden_CD, weight_BD.T, out_dtype=torch.float32)
        return hidden_CD.to(self.dtype) @ weight_BD.to(self.dtype).T

    def back(self, error_CB: Tensor, columns: slice) -> Tensor:
        """error @ head for a block, [C, D] of `dtype`."""
        weight_BD = self._rows(columns)
        if error_CB.dtype == weight_BD.dtype != self.dtype:
            return torch.mm(error_CB, weight_BD, out_dtype=torch.float32)
        return error_CB.to(self.dtype) @ weight_BD.to(self.dtype)

    def add_gradient(self, gradient_VD: Tensor, error_CB: Tensor, hidden_CD: Tensor, columns: slice) -> None:
        """Add error^T @ hidden to the rows of a block."""
        if error_CB.dtype == hidden_CD.dtype != self.dtype:
            product_BD = torch.mm(error_CB.T, hidden_CD, out_dtype=torch.float32)
        else:
            product_BD = error_CB.T.to(self.dtype) @ hidden_CD.to(self.dtype)
        if self.allowed_A is None:
            gradient_VD[columns].add_(product_BD)
        else:
            gradient_VD.index_add_(0, self.allowed_A[columns], product_BD)

    def error_dtype(self, hidden_CD: Tensor) -> torch.dtype:
        """What a block's gradient is kept in: the head's dtype where that is multiplied as it is."""
        return self.weight_VD.dtype if self._multiplies_halves(hidden_CD) else self.dtype

    def _rows(self, columns: slice) -> Tensor:
        return self.weight_VD[columns if self.allowed_A is None else self.allowed_A[columns]]

    def _multiplies_halves(self, hidden_CD: Tensor) -> bool:
        halves = (torch.bfloat16, torch.float16)
        return hidden_CD.is_cuda and hidden_CD.dtype == self.weight_VD.dtype in halves


class LogSum:
    """log sum e^x over columns that come in blocks, for each of C tokens."""

    def __init__(self, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.top_C = torch.full((tokens,), -torch.inf, dtype=dtype, device=device)
        self.sum_C = torch.zeros_like(self.top_C)

    def raise_to(self, top_C: Tensor) -> Tensor:
        """Let the sum count from a top at least as high; the factor by which all sums shrink."""
        higher_C = torch.maximum(self.top_C, top_C)
        # A token that has seen nothing yet has no top, and nothing to shrink.
        shrink_C = torch.where(self.top_C == -torch.inf, 0.0, (self.top_C - higher_C).exp())
        self.top_C = higher_C
        self.sum_C = self.sum_C * shrink_C
        return shrink_C

    def add(self, x_CB: Tensor) -> None:
        """Take in more columns; minus infinity counts for nothing."""
        self.raise_to(x_CB.amax(dim=1))
        base_C = torch.where(self.top_C == -torch.inf, 0.0, self.top_C)
        self.sum_C = self.sum_C + (x_CB - base_C[:, None]).exp_().sum(dim=1)

    def log(self) -> Tensor:
        """The logarithm in float64, minus infinity where nothing was seen."""
        return self.top_C.double() + self.sum_C.double().log()


class Sums:
    """All that the loss of a chunk needs of the whole vocabulary, taken in block by block.

    Attributes:
        student, teacher: log sum e^s and log sum e^t.
        first_student_C, first_teacher_C: the most likely columns, int64.
        energy_C, gap_C: sums of e^(t - top) t and of e^(t - top) (t - s), with the teacher's top.
    """

    def __init__(self, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.student, self.teacher = (LogSum(tokens, device, dtype) for _ in range(2))
        self.first_student_C, self.first_teacher_C = (
            torch.zeros(tokens, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.energy_C, self.gap_C = (torch.zeros(tokens, dtype=dtype, device=device) for _ in range(2))

    def add_(self, student_CB: Tensor, teacher_CB: Tensor | None, shaping: Shaping, start: int) -> None:
        """Take in a block that begins at column `start`. The raw tables are used up: what they hold afterwards is
        nobody's."""
        if fusable(student_CB):
            from trihybrid.ops.divergence.triton import add_block

            add_block(self, student_CB, teacher_CB, shaping.cap, shaping.temperature, start)
            return
        s_CB = shaping.apply_(student_CB)
        self.first_student_C = _see(self.student, self.first_student_C, s_CB, start)[0]
        self.student.sum_C = self.student.sum_C + (s_CB - self.student.top_C[:, None]).exp_().sum(dim=1)
        if teacher_CB is None:
            return
        t_CB = shaping.apply_(teacher_CB)
        self.first_teacher_C, shrink_C = _see(self.teacher, self.first_teacher_C, t_CB, start)
        share_CB = (t_CB - self.teacher.top_C[:, None]).exp_()
        self.teacher.sum_C = self.teacher.sum_C + share_CB.sum(dim=1)
        self.gap_C = self.gap_C * shrink_C + s_CB.neg_().add_(t_CB).mul_(share_CB).sum(dim=1)
        self.energy_C = self.energy_C * shrink_C + share_CB.mul_(t_CB).sum(dim=1)


def _see(total: LogSum, first_C: Tensor, x_CB: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The most likely column so far, and how much the sums shrink; the first of equal ones, as argmax has it."""
    top_C, place_C = x_CB.max(dim=1)
    first_C = torch.where(top_C > total.top_C, place_C + start, first_C)
    return first_C, total.raise_to(top_C)


def error_(
    student_CB: Tensor,
    teacher_CB: Tensor | None,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | None,
    shaping: Shaping,
    dtype: torch.dtype,
) -> Tensor:
    """(p_S - p_T) d x / d raw for a block, [C, B] of `dtype`; p_S alone without a teacher.

    student, teacher: (top_C, factor_C), with p = factor e^(x - top). The raw tables are used up; both may be one.
    """
    if fusable(student_CB):
        from trihybrid.ops.divergence.triton import block_error

        return block_error(student_CB, teacher_CB, student, teacher, shaping.cap, shaping.temperature, dtype)
    s_CB = shaping.apply_(student_CB)
    difference_CB = _probabilities_(s_CB.clone(), *student)
    if teacher is not None:
        assert teacher_CB is not None
        t_CB = s_CB.clone() if teacher_CB is student_CB else shaping.apply_(teacher_CB)
        difference_CB.sub_(_probabilities_(t_CB, *teacher))
    if shaping.cap is None:
        return difference_CB.div_(shaping.temperature).to(dtype)
    # 1 - tanh^2 in the place of the logits.
    s_CB.mul_(shaping.temperature / shaping.cap).square_().neg_().add_(1)
    return difference_CB.mul_(s_CB).div_(shaping.temperature).to(dtype)


def _probabilities_(x_CB: Tensor, top_C: Tensor, factor_C: Tensor) -> Tensor:
    return x_CB.sub_(top_C[:, None]).exp_().mul_(factor_C[:, None])


def fusable(table_CB: Tensor) -> bool:
    """Whether the kernels take it: float32 on a CUDA device."""
    return table_CB.is_cuda and table_CB.dtype == torch.float32
