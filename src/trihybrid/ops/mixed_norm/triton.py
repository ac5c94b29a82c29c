"""The kernels: tiles of whole rows, so that a norm needs no second pass; a tile stays inside one row of the batch.

The neighbours that the token shift asks for are loaded once more, from the cache. The backward needs the next row
alone: the gradient of the share a is, summed by parts, sum_t z_t (dr_t - dr_{t+1}), which leaves z^- out.

Legend: B batch, T time, D model width, R rows of a tile, P programs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

THREADS = 128


@dataclass(frozen=True)
class Shape:
    """How a kernel is cut, as it was fastest on an H200 at D = 512: a thread's elements of a tile, tiles under way at a
    time, registers a thread at most (None for no limit), programs a processor (None for one a tile)."""

    elements: int
    stages: int = 1
    registers: int | None = None
    programs: int | None = None

    def rows(self, width: int) -> int:
        """Rows of a tile."""
        return max(1, THREADS * self.elements // width)


FORWARD = Shape(elements=16)
BACKWARD = Shape(elements=8, stages=2, registers=128, programs=8)
BACKWARD_GATED = Shape(elements=8, stages=1, registers=96, programs=10)


def forward(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_BTD: Tensor | None,
    first_BTD: Tensor | None,
    mix_2D: Tensor | None,
    positions_BT: Tensor | None,
    shares_2D: Tensor | None,
    scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, z and an empty tensor, or u, r and k where positions [B, T] and shares are given; and the factor
    1 / sqrt(mean u^2 + epsilon) of every row, float32 [B, T].

    All but the positions are contiguous; mix and shares float32, the rest of one dtype.
    """
    batch, length, width = x_BTD.shape
    rows = FORWARD.rows(width)
    tiles = triton.cdiv(length, rows)
    u_BTD, r_BTD = torch.empty_like(x_BTD), torch.empty_like(x_BTD)
    k_BTD = torch.empty_like(x_BTD) if positions_BT is not None else x_BTD.new_empty(0)
    factor_BT = torch.empty(batch, length, device=x_BTD.device, dtype=torch.float32)
    _forward[(batch * tiles,)](
        x_BTD,
        *_present(x_BTD, branch_BTD, gate_BTD, first_BTD, mix_2D, positions_BT, shares_2D),
        u_BTD,
        r_BTD,
        k_BTD,
        factor_BT,
        length,
        tiles,
        *_strides(positions_BT),
        scale,
        epsilon,
        HAS_BRANCH=branch_BTD is not None,
        HAS_GATE=gate_BTD is not None,
        HAS_MIX=mix_2D is not None,
        BLEND=positions_BT is not None,
        WIDTH=width,
        ROWS=rows,
        num_warps=THREADS // 32,
    )
    return u_BTD, r_BTD, k_BTD, factor_BT


def backward(
    grad_u_BTD: Tensor,
    grad_r_BTD: Tensor,
    grad_k_BTD: Tensor | None,
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_BTD: Tensor | None,
    first_BTD: Tensor | None,
    mix_2D: Tensor | None,
    positions_BT: Tensor | None,
    shares_2D: Tensor | None,
    factor_BT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of s, of a gated branch, of its gate and of first, in x's dtype, and of mix and shares, float32
    [2, D]; empty for what is None. Without positions `grad_r` is that of z; with a gate x is u. All but the positions
    are contiguous."""
    batch, length, width = x_BTD.shape
    shape = BACKWARD if gate_BTD is None else BACKWARD_GATED
    assert shape.programs is not None
    rows = shape.rows(width)
    tiles = triton.cdiv(length, rows)
    processors = torch.cuda.get_device_properties(x_BTD.device).multi_processor_count
    programs = min(shape.programs * processors, batch * tiles)
    grad_s_BTD = torch.empty_like(x_BTD)
    grad_branch_BTD, grad_gate_BTD = (
        torch.empty_like(x_BTD) if gate_BTD is not None else x_BTD.new_empty(0) for _ in range(2)
    )
    grad_first_BTD = torch.empty_like(x_BTD) if mix_2D is not None else x_BTD.new_empty(0)
    parts_4PD = factor_BT.new_empty(4, programs, width)
    _backward[(programs,)](
        grad_u_BTD,
        grad_r_BTD,
        grad_r_BTD if grad_k_BTD is None else grad_k_BTD,
        x_BTD,
        *_present(x_BTD, branch_BTD, gate_BTD, first_BTD, mix_2D, positions_BT, shares_2D),
        factor_BT,
        grad_s_BTD,
        grad_branch_BTD,
        grad_gate_BTD,
        grad_first_BTD,
        parts_4PD,
        batch * tiles,
        length,
        tiles,
        *_strides(positions_BT),
        scale,
        HAS_BRANCH=branch_BTD is not None and gate_BTD is None,
        HAS_GATE=gate_BTD is not None,
        HAS_MIX=mix_2D is not None,
        BLEND=positions_BT is not None,
        WIDTH=width,
        ROWS=rows,
        STAGES=shape.stages,
        num_warps=THREADS // 32,
        maxnreg=shape.registers,
    )
    empty = factor_BT.new_empty(0)
    grad_mix_2D = empty if mix_2D is None else parts_4PD[:2].sum(1)
    grad_shares_2D = torch.empty_like(empty) if shares_2D is None else parts_4PD[2:].sum(1)
    return grad_s_BTD, grad_branch_BTD, grad_gate_BTD, grad_first_BTD, grad_mix_2D, grad_shares_2D


def _present(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, with one that no kernel reads for those that are None."""
    return [stand_in if tensor is None else tensor for tensor in tensors]


def _strides(positions_BT: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if positions_BT is None else positions_BT.stride()


@triton.jit
def _mixed(
    x,
    branch,
    gate,
    first,
    own_D,
    first_D,
    at_RD,
    mask_RD,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MIX: tl.constexpr,
):
    """s, first and u of a tile, float32; zero outside the mask."""
    s_RD = tl.load(x + at_RD, mask=mask_RD, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch_RD = tl.load(branch + at_RD, mask=mask_RD, other=0.0).to(tl.float32)
        if HAS_GATE:
            branch_RD *= tl.sigmoid(tl.load(gate + at_RD, mask=mask_RD, other=0.0).to(tl.float32))
        s_RD += branch_RD
    first_RD = s_RD
    u_RD = s_RD
    if HAS_MIX:
        first_RD = tl.load(first + at_RD, mask=mask_RD, other=0.0).to(tl.float32)
        u_RD = own_D[None, :] * s_RD + first_D[None, :] * first_RD
    return s_RD, first_RD, u_RD


@triton.jit
def _pair(pair_2D, wide_D, HAS: tl.constexpr, WIDTH: tl.constexpr):
    """Both rows of a [2, D] of float32; zeros, which nobody reads, where there is none."""
    if HAS:
        return tl.load(pair_2D + wide_D), tl.load(pair_2D + WIDTH + wide_D)
    else:
        return tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)


@triton.jit
def _forward(
    x,
    branch,
    gate,
    first,
    mix,
    positions,
    shares,
    u,
    r,
    k,
    factor,
    length,
    tiles,
    stride_b,
    stride_t,
    scale,
    epsilon,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MIX: tl.constexpr,
    BLEND: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = tl.program_id(0) // tiles
    t_R = (tl.program_id(0) - b * tiles) * ROWS + tl.arange(0, ROWS)
    inside_R = t_R < length
    row_R = b.to(tl.int64) * length + t_R
    wide_D = tl.arange(0, WIDTH)
    at_RD = row_R[:, None] * WIDTH + wide_D[None, :]
    inside_RD = inside_R[:, None] & (wide_D < WIDTH)[None, :]
    own_D, first_D = _pair(mix, wide_D, HAS_MIX, WIDTH)
    _, _, u_RD = _mixed(
        x, branch, gate, first, own_D, first_D, at_RD, inside_RD, HAS_BRANCH, HAS_GATE, HAS_MIX
    )
    factor_R = tl.rsqrt(tl.sum(u_RD * u_RD, 1) / WIDTH + epsilon)
    z_RD = u_RD * (scale * factor_R)[:, None]
    kind = u.dtype.element_ty
    tl.store(u + at_RD, u_RD.to(kind), mask=inside_RD)
    tl.store(factor + row_R, factor_R, mask=inside_R)
    if BLEND:
        later_R = inside_R & (t_R > 0)
        at_R = positions + b.to(tl.int64) * stride_b + t_R * stride_t
        follows_R = later_R & (tl.load(at_R, mask=later_R, other=0) > 0)
        follows_RD = follows_R[:, None] & (wide_D < WIDTH)[None, :]
        _, _, before_RD = _mixed(
            x, branch, gate, first, own_D, first_D, at_RD - WIDTH, follows_RD, HAS_BRANCH, HAS_GATE, HAS_MIX
        )
        before_R = tl.rsqrt(tl.sum(before_RD * before_RD, 1) / WIDTH + epsilon)
        before_RD = before_RD * (scale * before_R)[:, None]
        step_RD = z_RD - before_RD
        share_r_D, share_k_D = _pair(shares, wide_D, BLEND, WIDTH)
        tl.store(r + at_RD, (before_RD + share_r_D[None, :] * step_RD).to(kind), mask=inside_RD)
        tl.store(k + at_RD, (before_RD + share_k_D[None, :] * step_RD).to(kind), mask=inside_RD)
    else:
        tl.store(r + at_RD, z_RD.to(kind), mask=inside_RD)


@triton.jit
def _backward(
    grad_u,
    grad_r,
    grad_k,
    x,
    branch,
    gate,
    first,
    mix,
    positions,
    shares,
    factor,
    grad_s,
    grad_branch,
    grad_gate,
    grad_first,
    parts,
    count,
    length,
    tiles,
    stride_b,
    stride_t,
    scale,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MIX: tl.constexpr,
    BLEND: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    wide_D = tl.arange(0, WIDTH)
    own_D, first_D = _pair(mix, wide_D, HAS_MIX, WIDTH)
    share_r_D, share_k_D = _pair(shares, wide_D, BLEND, WIDTH)
    # Sums stay a row of the tile until the end: adding up columns is for a whole program, and these are registers.
    own_RD = tl.zeros((ROWS, WIDTH), tl.float32)
    mixed_RD = tl.zeros((ROWS, WIDTH), tl.float32)
    sum_r_RD = tl.zeros((ROWS, WIDTH), tl.float32)
    sum_k_RD = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=STAGES):
        b = tile // tiles
        t_R = (tile - b * tiles) * ROWS + tl.arange(0, ROWS)
        inside_R = t_R < length
        row_R = tl.cast(b, tl.int64) * length + t_R
        at_RD = row_R[:, None] * WIDTH + wide_D[None, :]
        inside_RD = inside_R[:, None] & (wide_D < WIDTH)[None, :]
        s_RD, first_RD, u_RD = _mixed(
            x, branch, gate, first, own_D, first_D, at_RD, inside_RD, HAS_BRANCH, False, HAS_MIX
        )
        factor_R = tl.load(factor + row_R, mask=inside_R, other=0.0)
        n_RD = u_RD * factor_R[:, None]
        dz_RD = tl.load(grad_r + at_RD, mask=inside_RD, other=0.0).to(tl.float32)
        if BLEND:
            early_R = t_R + 1 < length
            at_R = positions + tl.cast(b, tl.int64) * stride_b + (t_R + 1) * stride_t
            led_R = early_R & (tl.load(at_R, mask=early_R, other=0) > 0)
            led_RD = led_R[:, None] & (wide_D < WIDTH)[None, :]
            next_r_RD = tl.load(grad_r + at_RD + WIDTH, mask=led_RD, other=0.0).to(tl.float32)
            next_k_RD = tl.load(grad_k + at_RD + WIDTH, mask=led_RD, other=0.0).to(tl.float32)
            step_r_RD = dz_RD - next_r_RD
            step_k_RD = tl.load(grad_k + at_RD, mask=inside_RD, other=0.0).to(tl.float32) - next_k_RD
            sum_r_RD += step_r_RD * n_RD
            sum_k_RD += step_k_RD * n_RD
            dz_RD = share_r_D[None, :] * step_r_RD + share_k_D[None, :] * step_k_RD + next_r_RD + next_k_RD
        along_R = tl.sum(dz_RD * n_RD, 1) / WIDTH
        du_RD = tl.load(grad_u + at_RD, mask=inside_RD, other=0.0).to(tl.float32)
        du_RD += (scale * factor_R)[:, None] * (dz_RD - n_RD * along_R[:, None])
        kind = grad_s.dtype.element_ty
        if HAS_MIX:
            own_RD += du_RD * s_RD
            mixed_RD += du_RD * first_RD
            tl.store(grad_first + at_RD, (first_D[None, :] * du_RD).to(kind), mask=inside_RD)
            du_RD = own_D[None, :] * du_RD
        tl.store(grad_s + at_RD, du_RD.to(kind), mask=inside_RD)
        if HAS_GATE:
            branch_RD = tl.load(branch + at_RD, mask=inside_RD, other=0.0).to(tl.float32)
            open_RD = tl.sigmoid(tl.load(gate + at_RD, mask=inside_RD, other=0.0).to(tl.float32))
            du_RD *= open_RD
            tl.store(grad_branch + at_RD, du_RD.to(kind), mask=inside_RD)
            tl.store(grad_gate + at_RD, (du_RD * branch_RD * (1 - open_RD)).to(kind), mask=inside_RD)
    at_D = parts + tl.program_id(0) * WIDTH + wide_D
    block = tl.num_programs(0) * WIDTH
    if HAS_MIX:
        tl.store(at_D, tl.sum(own_RD, 0))
        tl.store(at_D + block, tl.sum(mixed_RD, 0))
    if BLEND:
        tl.store(at_D + 2 * block, scale * tl.sum(sum_r_RD, 0))
        tl.store(at_D + 3 * block, scale * tl.sum(sum_k_RD, 0))
