"""The kernels: one program a tile of queries (or of keys) and head, over the few tiles that the window reaches.

Scores are kept in base 2: p = 2^(s - norm) with s = scale log2(e) q . k and norm = log2 of the row's sum.

Legend: Q tile of queries, K tile of keys, D head width.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64


def forward(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, positions_BT: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, D] and the log2 of each row's sum of exponentials, float32 [B, H, T]. All contiguous."""
    batch, length, heads, width = q_BTHD.shape
    o_BTHD = torch.empty_like(q_BTHD)
    norm_BHT = q_BTHD.new_empty((batch, heads, length), dtype=torch.float32)
    _forward[(length // TILE, batch * heads)](
        q_BTHD, k_BTGD, v_BTGD, positions_BT, o_BTHD, norm_BHT, length, heads, k_BTGD.shape[2], window,
        scale * math.log2(math.e), WIDTH=width, TILE=TILE, num_warps=4, num_stages=2,
    )  # fmt: skip
    return o_BTHD, norm_BHT


def backward(
    grad_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    positions_BT: Tensor,
    o_BTHD: Tensor,
    norm_BHT: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, from that of the outputs. All contiguous."""
    batch, length, heads, width = q_BTHD.shape
    groups = k_BTGD.shape[2]
    dq_BTHD, dk_BTGD, dv_BTGD = torch.empty_like(q_BTHD), torch.empty_like(k_BTGD), torch.empty_like(v_BTGD)
    delta_BHT = torch.empty_like(norm_BHT)
    _backward_queries[(length // TILE, batch * heads)](
        q_BTHD, k_BTGD, v_BTGD, positions_BT, o_BTHD, norm_BHT, grad_BTHD, delta_BHT, dq_BTHD, length, heads,
        groups, window, scale, WIDTH=width, TILE=TILE, num_warps=4, num_stages=2,
    )  # fmt: skip
    _backward_keys[(length // TILE, batch * groups)](
        q_BTHD, k_BTGD, v_BTGD, positions_BT, norm_BHT, grad_BTHD, delta_BHT, dk_BTGD, dv_BTGD, length, heads,
        groups, window, scale, WIDTH=width, TILE=TILE, num_warps=4, num_stages=2,
    )  # fmt: skip
    return dq_BTHD, dk_BTGD, dv_BTGD


@triton.jit
def _tile(base, row, head, heads, rows_R, width_D, WIDTH: tl.constexpr):
    """Pointers of rows [R, D] of one head in a tensor [rows, heads, WIDTH]."""
    return base + ((row + rows_R).to(tl.int64)[:, None] * heads + head) * WIDTH + width_D[None, :]


@triton.jit
def _forward(
    q, k, v, positions, o, norm, length, heads, groups, window, scale2, WIDTH: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    first, batch, head = tl.program_id(0) * TILE, tl.program_id(1) // heads, tl.program_id(1) % heads
    group = head // (heads // groups)
    rows = tl.arange(0, TILE)
    wide = tl.arange(0, WIDTH)
    start = batch.to(tl.int64) * length
    q_QD = tl.load(_tile(q, start + first, head, heads, rows, wide, WIDTH))
    reach_Q = tl.minimum(tl.load(positions + start + first + rows), window - 1)
    top_Q = tl.full((TILE,), -float("inf"), tl.float32)
    sum_Q = tl.zeros((TILE,), tl.float32)
    o_QD = tl.zeros((TILE, WIDTH), tl.float32)
    lowest = tl.maximum(0, (first - window + 1) // TILE * TILE)
    for key in range(lowest, first + TILE, TILE):
        k_KD = tl.load(_tile(k, start + key, group, groups, rows, wide, WIDTH))
        v_KD = tl.load(_tile(v, start + key, group, groups, rows, wide, WIDTH))
        distance_QK = (first + rows)[:, None] - (key + rows)[None, :]
        seen_QK = (distance_QK >= 0) & (distance_QK <= reach_Q[:, None])
        s_QK = tl.where(seen_QK, tl.dot(q_QD, k_KD.T) * scale2, -float("inf"))
        higher_Q = tl.maximum(top_Q, tl.max(s_QK, 1))
        # A row that has seen nothing yet has no maximum; its exponentials are zero whatever is subtracted.
        base_Q = tl.where(higher_Q == -float("inf"), 0.0, higher_Q)
        p_QK = tl.exp2(s_QK - base_Q[:, None])
        shrink_Q = tl.exp2(top_Q - base_Q)
        sum_Q = sum_Q * shrink_Q + tl.sum(p_QK, 1)
        o_QD = o_QD * shrink_Q[:, None] + tl.dot(p_QK.to(v_KD.dtype), v_KD)
        top_Q = higher_Q
    tl.store(_tile(o, start + first, head, heads, rows, wide, WIDTH), (o_QD / sum_Q[:, None]).to(q_QD.dtype))
    tl.store(norm + tl.program_id(1).to(tl.int64) * length + first + rows, top_Q + tl.log2(sum_Q))


@triton.jit
def _backward_queries(
    q, k, v, positions, o, norm, grad, delta, dq, length, heads, groups, window, scale,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    first, batch, head = tl.program_id(0) * TILE, tl.program_id(1) // heads, tl.program_id(1) % heads
    group = head // (heads // groups)
    rows = tl.arange(0, TILE)
    wide = tl.arange(0, WIDTH)
    start = batch.to(tl.int64) * length
    line = tl.program_id(1).to(tl.int64) * length + first + rows
    q_QD = tl.load(_tile(q, start + first, head, heads, rows, wide, WIDTH))
    grad_QD = tl.load(_tile(grad, start + first, head, heads, rows, wide, WIDTH))
    o_QD = tl.load(_tile(o, start + first, head, heads, rows, wide, WIDTH))
    delta_Q = tl.sum(grad_QD.to(tl.float32) * o_QD.to(tl.float32), 1)
    tl.store(delta + line, delta_Q)
    norm_Q = tl.load(norm + line)
    reach_Q = tl.minimum(tl.load(positions + start + first + rows), window - 1)
    dq_QD = tl.zeros((TILE, WIDTH), tl.float32)
    lowest = tl.maximum(0, (first - window + 1) // TILE * TILE)
    for key in range(lowest, first + TILE, TILE):
        k_KD = tl.load(_tile(k, start + key, group, groups, rows, wide, WIDTH))
        v_KD = tl.load(_tile(v, start + key, group, groups, rows, wide, WIDTH))
        distance_QK = (first + rows)[:, None] - (key + rows)[None, :]
        seen_QK = (distance_QK >= 0) & (distance_QK <= reach_Q[:, None])
        s_QK = tl.dot(q_QD, k_KD.T) * (scale * 1.4426950408889634)
        p_QK = tl.where(seen_QK, tl.exp2(s_QK - norm_Q[:, None]), 0.0)
        ds_QK = p_QK * (tl.dot(grad_QD, v_KD.T) - delta_Q[:, None])
        dq_QD += tl.dot(ds_QK.to(k_KD.dtype), k_KD)
    tl.store(_tile(dq, start + first, head, heads, rows, wide, WIDTH), (dq_QD * scale).to(q_QD.dtype))


@triton.jit
def _backward_keys(
    q, k, v, positions, norm, grad, delta, dk, dv, length, heads, groups, window, scale,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    first, batch, group = tl.program_id(0) * TILE, tl.program_id(1) // groups, tl.program_id(1) % groups
    rows = tl.arange(0, TILE)
    wide = tl.arange(0, WIDTH)
    start = batch.to(tl.int64) * length
    k_KD = tl.load(_tile(k, start + first, group, groups, rows, wide, WIDTH))
    v_KD = tl.load(_tile(v, start + first, group, groups, rows, wide, WIDTH))
    dk_KD = tl.zeros((TILE, WIDTH), tl.float32)
    dv_KD = tl.zeros((TILE, WIDTH), tl.float32)
    share = heads // groups
    for member in range(share):
        head = group * share + member
        for query in range(first, tl.minimum(length, first + TILE + window - 1), TILE):
            line = (batch * heads + head).to(tl.int64) * length + query + rows
            q_QD = tl.load(_tile(q, start + query, head, heads, rows, wide, WIDTH))
            grad_QD = tl.load(_tile(grad, start + query, head, heads, rows, wide, WIDTH))
            reach_Q = tl.minimum(tl.load(positions + start + query + rows), window - 1)
            distance_KQ = (query + rows)[None, :] - (first + rows)[:, None]
            seen_KQ = (distance_KQ >= 0) & (distance_KQ <= reach_Q[None, :])
            s_KQ = tl.dot(k_KD, q_QD.T) * (scale * 1.4426950408889634)
            p_KQ = tl.where(seen_KQ, tl.exp2(s_KQ - tl.load(norm + line)[None, :]), 0.0)
            dv_KD += tl.dot(p_KQ.to(grad_QD.dtype), grad_QD)
            ds_KQ = p_KQ * (tl.dot(v_KD, grad_QD.T) - tl.load(delta + line)[None, :])
            dk_KD += tl.dot(ds_KQ.to(q_QD.dtype), q_QD)
    tl.store(_tile(dk, start + first, group, groups, rows, wide, WIDTH), (dk_KD * scale).to(k_KD.dtype))
    tl.store(_tile(dv, start + first, group, groups, rows, wide, WIDTH), dv_KD.to(v_KD.dtype))
