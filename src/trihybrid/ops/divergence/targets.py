"""What the student's distribution is held to: the teacher's, its most likely tokens and one bucket, or a token.

Each target takes in a chunk of tokens twice, block by block of the vocabulary: for the loss, then for its gradient.

Shapes: C tokens of a chunk, B columns of a block, K tokens of the teacher's choice, N all tokens, D model width.
"""

from typing import Protocol

import torch
from torch import Tensor

from trihybrid.ops.divergence.tables import Head, LogSum, Shaping, Sums, error_, fusable


class Target(Protocol):
    """One loss a token. `begin`, then `see` every block, then `loss`; for the gradient `error` of every block."""

    def begin(self, rows: slice) -> None:
        """Turn to the tokens `rows`."""
        ...

    def products(self, columns: slice, again: bool) -> Tensor | None:
        """The raw table [C, B] of the target's own side for a block; None where it has none, or, `again` for the
        gradient, where that does without."""
        ...

    def see(self, student_CB: Tensor, own_CB: Tensor | None, columns: slice) -> None:
        """Take in a block of raw logits; the tables are used up, unless it `spares` them."""
        ...

    def spares(self, student_CB: Tensor) -> bool:
        """Whether `see` leaves such tables as they are."""
        ...

    def loss(self) -> Tensor:
        """The loss of each token, float64 [C]."""
        ...

    def error(self, student_CB: Tensor, own_CB: Tensor | None, columns: slice, dtype: torch.dtype) -> Tensor:
        """d loss / d raw student logits for a block, [C, B] of `dtype`; the tables are used up."""
        ...


class TeacherTarget:
    """KL(p_T || p_S) over the whole vocabulary: sum p_T (t - s) - log sum e^t + log sum e^s.

    Attributes:
        entropy_N, same_N: float64 entropy of the teacher, and 1 where both find the same token most likely.
    """

    def __init__(self, hidden_ND: Tensor, head: Head, shaping: Shaping) -> None:
        self.hidden_ND, self.head, self.shaping = hidden_ND, head, shaping
        self.entropy_N, self.same_N = (
            hidden_ND.new_zeros(hidden_ND.shape[0], dtype=torch.float64) for _ in range(2)
        )

    def begin(self, rows: slice) -> None:
        self.rows = rows
        self.hidden_CD = self.hidden_ND[rows]
        self.sums = Sums(self.hidden_CD.shape[0], self.hidden_CD.device, self.head.dtype)

    def products(self, columns: slice, again: bool) -> Tensor | None:
        return self.head.logits(self.hidden_CD, columns)

    def see(self, student_CB: Tensor, own_CB: Tensor | None, columns: slice) -> None:
        self.sums.add_(student_CB, own_CB, self.shaping, columns.start)

    def spares(self, student_CB: Tensor) -> bool:
        return fusable(student_CB)

    def loss(self) -> Tensor:
        sums, weight_C = self.sums, self.sums.teacher.sum_C.double()
        self.entropy_N[self.rows] = sums.teacher.log() - sums.energy_C / weight_C
        self.same_N[self.rows] = (sums.first_teacher_C == sums.first_student_C).double()
        # Tops are compared before they are widened, as the logits were: one certain token costs exactly nothing.
        tops_C = (sums.teacher.top_C - sums.student.top_C).double()
        return sums.gap_C / weight_C - tops_C + (sums.student.sum_C.double() / weight_C).log()

    def error(self, student_CB: Tensor, own_CB: Tensor | None, columns: slice, dtype: torch.dtype) -> Tensor:
        student, teacher = (
            (total.top_C, 1 / total.sum_C) for total in (self.sums.student, self.sums.teacher)
        )
        return error_(student_CB, own_CB, student, teacher, self.shaping, dtype)


class TopTarget(TeacherTarget):
    """The same over K + 1 outcomes: the teacher's most likely tokens, and a bucket for all others.

    With r the bucket: dL/ds_v = p_S(v) - p_T(v) for the K, and p_S(v) - p_T(r) p_S(v) / p_S(r) for v in the bucket.
    What falls into the bucket is summed up there, not subtracted from one, so that a bucket of 1e-12 has digits too.
    """

    def __init__(self, hidden_ND: Tensor, head: Head, shaping: Shaping, top_k: int) -> None:
        super().__init__(hidden_ND, head, shaping)
        self.top_k = min(top_k, head.size)

    def begin(self, rows: slice) -> None:
        super().begin(rows)
        tokens, device, dtype = self.hidden_CD.shape[0], self.hidden_CD.device, self.head.dtype
        self.rest_teacher, self.rest_student = (LogSum(tokens, device, dtype) for _ in range(2))
        self.chosen_CK = torch.empty(tokens, 0, dtype=torch.int64, device=device)
        self.t_CK, self.s_CK = (torch.empty(tokens, 0, dtype=dtype, device=device) for _ in range(2))
        self.first_student_C = self.chosen_CK.new_zeros(tokens)
        self.top_student_C = torch.full((tokens,), -torch.inf, dtype=dtype, device=device)

    def products(self, columns: slice, again: bool) -> Tensor | None:
        return None if again else super().products(columns, again)

    def see(self, student_CB: Tensor, own_CB: Tensor | None, columns: slice) -> None:
        assert own_CB is not None
        s_CB, t_CB = self.shaping.apply_(student_CB), self.shaping.apply_(own_CB)
        top_C, place_C = s_CB.max(dim=1)
        self.first_student_C = torch.where(
            top_C > self.top_student_C, place_C + columns.start, self.first_student_C
        )
        self.top_student_C = torch.maximum(self.top_student_C, top_C)
        t_CK, place_CK = t_CB.topk(min(self.top_k, t_CB.shape[1]), dim=1)
        s_CK = s_CB.gather(1, place_CK)
        self.rest_teacher.add(t_CB.scatter_(1, place_CK, -torch.inf))
        self.rest_student.add(s_CB.scatter_(1, place_CK, -torch.inf))
        # The best of those before and of these; the others fall into the bucket.
        t_CK, order_CK = torch.cat([self.t_CK, t_CK], dim=1).sort(dim=1, descending=True, stable=True)
        s_CK = torch.cat([self.s_CK, s_CK], dim=1).gather(1, order_CK)
        chosen_CK = torch.cat([self.chosen_CK, place_CK + columns.start], dim=1).gather(1, order_CK)
        if t_CK.shape[1] > self.top_k:
            self.rest_teacher.add(t_CK[:, self.top_k :])
            self.rest_student.add(s_CK[:, self.top_k :])
        self.t_CK, self.s_CK, self.chosen_CK = (x[:, : self.top_k] for x in (t_CK, s_CK, chosen_CK))

    def spares(self, student_CB: Tensor) -> bool:
        return False

    def loss(self) -> Tensor:
        t_CK, s_CK = self.t_CK.double(), self.s_CK.double()
        rest_t_C, rest_s_C = self.rest_teacher.log(), self.rest_student.log()
        log_teacher_C = torch.logaddexp(t_CK.logsumexp(dim=1), rest_t_C)
        log_student_C = torch.logaddexp(s_CK.logsumexp(dim=1), rest_s_C)
        self.p_teacher_CK = (t_CK - log_teacher_C[:, None]).exp()
        self.p_student_CK = (s_CK - log_student_C[:, None]).exp()
        self.bucket_C = (rest_t_C - log_teacher_C).exp()
        self.log_student_C = log_student_C
        filled_C = self.bucket_C > 0
        self.entropy_N[self.rows] = (
            log_teacher_C
            - (self.p_teacher_CK * t_CK).sum(dim=1)
            - torch.where(filled_C, self.bucket_C * rest_t_C, 0.0)
        )
        self.same_N[self.rows] = (self.chosen_CK[:, 0] == self.first_student_C).double()
        return (
            (self.p_teacher_CK * (t_CK - s_CK)).sum(dim=1)
            + torch.where(filled_C, self.bucket_C * (rest_t_C - rest_s_C), 0.0)
            - log_teacher_C
            + log_student_C
        )

    def error(self, student_CB: Tensor, own_CB: Tensor | None, columns: slice, dtype: torch.dtype) -> Tensor:
        rest, top_C = self.rest_student, self.top_student_C
        student = (top_C, (top_C.double() - self.log_student_C).exp().to(top_C.dtype))
        # The student's own distribution inside the bucket, as much of it as the teacher has there.
        empty_C = (rest.sum_C == 0) | (self.bucket_C == 0)
        share_C = torch.where(empty_C, 0.0, self.bucket_C / rest.sum_C).to(top_C.dtype)
        inside = (torch.where(empty_C, top_C, rest.top_C), share_C)
        error_CB = error_(student_CB, student_CB, student, inside, self.shaping, dtype)
        slope_CK = self.shaping.slope(self.s_CK)
        wanted_CK = (self.p_student_CK - self.p_teacher_CK).to(slope_CK.dtype) * slope_CK
        return _put(error_CB, columns, self.chosen_CK, wanted_CK)


class TokenTarget:
    """Cross-entropy against one token: log sum e^s - s_target."""

    def __init__(self, hidden_ND: Tensor, head: Head, shaping: Shaping, targets_N: Tensor) -> None:
        self.hidden_ND, self.head, self.shaping, self.targets_N = hidden_ND, head, shaping, targets_N

    def begin(self, rows: slice) -> None:
        self.targets_C1 = self.targets_N[rows].unsqueeze(1)
        tokens, device, dtype = self.targets_C1.shape[0], self.hidden_ND.device, self.head.dtype
        self.sums = Sums(tokens, device, dtype)
        self.s_C1 = torch.zeros(tokens, 1, dtype=dtype, device=device)

    def products(self, columns: slice, again: bool) -> Tensor | None:
        return None

    def see(self, student_CB: Tensor, own_CB: Tensor | None, columns: slice) -> None:
        place_C1, inside_C1 = _places(self.targets_C1, columns)
        found_C1 = self.shaping.apply_(student_CB.gather(1, place_C1))
        self.s_C1 = torch.where(inside_C1, found_C1, self.s_C1)
        self.sums.add_(student_CB, None, self.shaping, columns.start)

    def spares(self, student_CB: Tensor) -> bool:
        return fusable(student_CB)

    def loss(self) -> Tensor:
        return self.sums.student.log() - self.s_C1.squeeze(1)

    def error(self, student_CB: Tensor, own_CB: Tensor | None, columns: slice, dtype: torch.dtype) -> Tensor:
        total = self.sums.student
        error_CB = error_(student_CB, None, (total.top_C, 1 / total.sum_C), None, self.shaping, dtype)
        p_C1 = (self.s_C1.squeeze(1) - total.top_C).exp().div(total.sum_C).unsqueeze(1)
        return _put(error_CB, columns, self.targets_C1, (p_C1 - 1) * self.shaping.slope(self.s_C1))


def _places(chosen_CK: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where columns of the vocabulary stand in a block, 0 for those outside of it, and which stand inside."""
    place_CK = chosen_CK - columns.start
    inside_CK = (place_CK >= 0) & (chosen_CK < columns.stop)
    return torch.where(inside_CK, place_CK, 0), inside_CK


def _put(table_CB: Tensor, columns: slice, chosen_CK: Tensor, values_CK: Tensor) -> Tensor:
    """Overwrite, in place, those of the columns `chosen_CK` that lie in the block. The others are written onto the
    block's first column, which is put right afterwards: to pick them out, a GPU would have to be waited for."""
    place_CK, inside_CK = _places(chosen_CK, columns)
    values_CK = values_CK.to(table_CB.dtype)
    first_C = table_CB[:, 0].clone()
    table_CB.scatter_(1, place_CK, values_CK)
    hit_CK = inside_CK & (place_CK == 0)
    table_CB[:, 0] = torch.where(hit_CK.any(dim=1), torch.where(hit_CK, values_CK, 0.0).sum(dim=1), first_C)
    return table_CB
