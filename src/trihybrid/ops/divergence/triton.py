"""The kernels: what is no matrix product in a block of logits, with one reading of it instead of some ten.

One program a token goes along the block for the sums; one a token and tile makes the gradient. float32 throughout; the
gradient is stored in the dtype that it is multiplied in.

Legend: C tokens of a chunk, B columns of a block, R columns of a tile.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.tanh import tanh

if TYPE_CHECKING:
    from trihybrid.ops.divergence.tables import Sums

TILE = 1024
SUM_TILE = 4096
"""Wide, because one token is one program: with 256 tokens a chunk, two of them on a processor have to keep it busy."""


def add_block(
    sums: "Sums",
    student_CB: Tensor,
    teacher_CB: Tensor | None,
    cap: float | None,
    temperature: float,
    start: int,
) -> None:
    """Take the raw logits of a block, float32 and contiguous, into `sums`."""
    tokens, columns = student_CB.shape
    other_CB = student_CB if teacher_CB is None else teacher_CB
    _add_block[(tokens,)](
        student_CB, other_CB, sums.student.top_C, sums.student.sum_C, sums.first_student_C,
        sums.teacher.top_C, sums.teacher.sum_C, sums.first_teacher_C, sums.energy_C, sums.gap_C,
        columns, start, cap or 1.0, 1 / temperature,
        CAPPED=cap is not None, TEACHER=teacher_CB is not None, TILE=SUM_TILE, num_warps=8,
    )  # fmt: skip


def block_error(
    student_CB: Tensor,
    teacher_CB: Tensor | None,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | None,
    cap: float | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """What `error_` of `tables` returns, in fresh memory."""
    tokens, columns = student_CB.shape
    error_CB = torch.empty(student_CB.shape, dtype=dtype, device=student_CB.device)
    other_CB = student_CB if teacher_CB is None else teacher_CB
    other = student if teacher is None else teacher
    _block_error[(tokens, triton.cdiv(columns, TILE))](
        student_CB, other_CB, error_CB, *student, *other, columns, cap or 1.0, 1 / temperature,
        CAPPED=cap is not None, TEACHER=teacher is not None, TILE=TILE, num_warps=4,
    )  # fmt: skip
    return error_CB


@triton.jit
def _shaped(raw, cap, over_temperature, CAPPED: tl.constexpr):
    if CAPPED:
        raw = tanh(raw / cap) * cap
    return raw * over_temperature


@triton.jit
def _add_block(
    student, teacher, top_s, sum_s, first_s, top_t, sum_t, first_t, energy, gap, columns, start, cap,
    over_temperature, CAPPED: tl.constexpr, TEACHER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    line = token.to(tl.int64) * columns
    place_R = tl.arange(0, TILE)
    s_top, s_sum, s_first = tl.load(top_s + token), tl.load(sum_s + token), tl.load(first_s + token)
    if TEACHER:
        t_top, t_sum, t_first = tl.load(top_t + token), tl.load(sum_t + token), tl.load(first_t + token)
        t_energy, t_gap = tl.load(energy + token), tl.load(gap + token)
    for begin in range(0, columns, TILE):
        column_R = begin + place_R
        there_R = column_R < columns
        s_R = _shaped(tl.load(student + line + column_R, there_R, other=0.0), cap, over_temperature, CAPPED)
        s_R = tl.where(there_R, s_R, -float("inf"))
        s_high = tl.max(s_R, 0)
        s_place = tl.min(tl.where(s_R == s_high, column_R, columns), 0)
        s_first = tl.where(s_high > s_top, start + s_place, s_first)
        s_next = tl.maximum(s_top, s_high)
        s_sum = s_sum * tl.exp(s_top - s_next) + tl.sum(tl.exp(s_R - s_next), 0)
        s_top = s_next
        if TEACHER:
            t_R = _shaped(
                tl.load(teacher + line + column_R, there_R, other=0.0), cap, over_temperature, CAPPED
            )
            t_R = tl.where(there_R, t_R, -float("inf"))
            t_high = tl.max(t_R, 0)
            t_place = tl.min(tl.where(t_R == t_high, column_R, columns), 0)
            t_first = tl.where(t_high > t_top, start + t_place, t_first)
            t_next = tl.maximum(t_top, t_high)
            shrink = tl.exp(t_top - t_next)
            share_R = tl.exp(t_R - t_next)
            t_sum = t_sum * shrink + tl.sum(share_R, 0)
            t_energy = t_energy * shrink + tl.sum(tl.where(there_R, share_R * t_R, 0.0), 0)
            t_gap = t_gap * shrink + tl.sum(tl.where(there_R, share_R * (t_R - s_R), 0.0), 0)
            t_top = t_next
    tl.store(top_s + token, s_top)
    tl.store(sum_s + token, s_sum)
    tl.store(first_s + token, s_first)
    if TEACHER:
        tl.store(top_t + token, t_top)
        tl.store(sum_t + token, t_sum)
        tl.store(first_t + token, t_first)
        tl.store(energy + token, t_energy)
        tl.store(gap + token, t_gap)


@triton.jit
def _block_error(
    student, teacher, error, top_s, factor_s, top_t, factor_t, columns, cap, over_temperature,
    CAPPED: tl.constexpr, TEACHER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    line = token.to(tl.int64) * columns
    column_R = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there_R = column_R < columns
    raw_R = tl.load(student + line + column_R, there_R, other=0.0)
    s_R = _shaped(raw_R, cap, over_temperature, CAPPED)
    error_R = tl.exp(s_R - tl.load(top_s + token)) * tl.load(factor_s + token)
    if TEACHER:
        t_R = _shaped(tl.load(teacher + line + column_R, there_R, other=0.0), cap, over_temperature, CAPPED)
        error_R -= tl.exp(t_R - tl.load(top_t + token)) * tl.load(factor_t + token)
    if CAPPED:
        tanh_R = tanh(raw_R / cap)
        error_R *= 1 - tanh_R * tanh_R
    tl.store(error + line + column_R, (error_R * over_temperature).to(error.dtype.element_ty), there_R)
