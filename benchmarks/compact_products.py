"""The fused products of the squared MLP: the kernel in use, candidates for its place, and the plain product of cuBLAS.

    python benchmarks/compact_products.py

A product writes its tile in four parts. The kernel in use hands each to the bulk copy engine, and waits for the part
before to leave the one buffer that they share; the compiler's listing shows four such waits a tile. The candidates
write with plain stores, which wait for nothing, and differ in when the backward asks for the squares: before the
product, or after it. 131,072 tokens, widths of the 27 M hybrid, bfloat16, medians; the ratio is to cuBLAS, which has no
activation to work on. Errors are relative, against float64 on the first 4,096 tokens.
"""

import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench
from triton.tools.tensor_descriptor import TensorDescriptor

from trihybrid.ops.squared_mlp.triton import _halves, _tile, activate, activate_backward

TOKENS, WIDTH, CHECKED = 131_072, 512, 4096
SHAPES = ((1536, 0.5), (512, 0.0))  # inner width and slope: the MLP, and the token shift's key
TILE, TILE_D, GROUP, PROGRAMS_A_PROCESSOR = 128, 64, 8, 2


def main() -> int:
    """Print the table; 1 where something is wrong."""
    torch.manual_seed(0)
    print("| product | inner width | who | ms | TFLOP/s | of cuBLAS | error |\n|---|---|---|---|---|---|---|")
    right = True
    for inner, slope in SHAPES:
        plain: dict[str, float] = {}
        for product, who, call, exact_NI in products(inner, slope):
            found_NI = call()[:CHECKED].double()
            error = 0.0 if exact_NI is None else ((found_NI - exact_NI).norm() / exact_NI.norm()).item()
            right = right and error < 1e-2
            ms = do_bench(call, return_mode="median")
            plain.setdefault(product, ms)
            rate = 2 * TOKENS * inner * WIDTH / ms / 1e9
            print(
                f"| {product} | {inner} | {who} | {ms:.3f} | {rate:.0f} | {ms / plain[product]:.2f} | {error:.1e} |",
                flush=True,
            )
    return 0 if right else 1


Form = tuple[str, str, Callable[[], Tensor], Tensor | None]


def products(inner: int, slope: float) -> list[Form]:
    """(direction, whose, the call, its exact first rows), cuBLAS first in each direction."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale

    x_ND, grad_ND = random(TOKENS, WIDTH), random(TOKENS, WIDTH)
    up_ID, down_DI = random(inner, WIDTH, scale=WIDTH**-0.5), random(WIDTH, inner, scale=inner**-0.5)
    active_NI, signs_WN = activate(x_ND, up_ID, slope)
    h_NI = x_ND[:CHECKED].double() @ up_ID.double().mT
    square_NI = torch.where(h_NI > 0, h_NI, slope * h_NI).square()
    grad_NI = grad_ND[:CHECKED].double() @ down_DI.double()
    grad_NI *= 2 * torch.where(h_NI > 0, h_NI, slope**2 * h_NI)
    back = (grad_ND, down_DI, active_NI, signs_WN, slope)
    return [
        ("forward", "cuBLAS", lambda: x_ND @ up_ID.mT, None),
        ("forward", "in use", lambda: activate(x_ND, up_ID, slope)[0], square_NI),
        ("forward", "plain stores", lambda: candidate(x_ND, up_ID, None, signs_WN, slope), square_NI),
        ("backward", "cuBLAS", lambda: grad_ND @ down_DI, None),
        ("backward", "in use", lambda: activate_backward(*back), grad_NI),
        ("backward", "plain stores, squares after", lambda: candidate(*back), grad_NI),
        ("backward", "plain stores, squares before", lambda: candidate(*back, early=True), grad_NI),
    ]


def candidate(
    rows_ND: Tensor,
    weight: Tensor,
    active_NI: Tensor | None,
    signs_WN: Tensor,
    slope: float,
    early: bool = False,
) -> Tensor:
    """The square of x U^T, with its signs, where there is no `active_NI`; with it what `activate_backward` returns."""
    backward = active_NI is not None
    tokens, width = rows_ND.shape
    inner = weight.shape[1] if backward else weight.shape[0]
    out_NI = rows_ND.new_empty(tokens, inner)
    processors = torch.cuda.get_device_properties(rows_ND.device).multi_processor_count
    tiles = triton.cdiv(tokens, TILE) * triton.cdiv(inner, TILE)
    _product[(min(PROGRAMS_A_PROCESSOR * processors, tiles),)](
        TensorDescriptor.from_tensor(rows_ND, [TILE, TILE_D]),
        TensorDescriptor.from_tensor(weight, [TILE_D, TILE] if backward else [TILE, TILE_D]),
        out_NI if active_NI is None else active_NI,
        out_NI,
        signs_WN,
        tokens,
        inner,
        width,
        slope,
        BACKWARD=backward,
        SLOPED=slope > 0,
        EARLY=early,
        TILE=TILE,
        TILE_D=TILE_D,
        GROUP=GROUP,
        num_stages=3,
        num_warps=4,
    )
    return out_NI


@triton.jit
def _columns(x, n, i, width_i, TILE: tl.constexpr):
    """Pointers to 32 columns of a tile."""
    row_N = n + tl.arange(0, TILE)
    return x + row_N.to(tl.int64)[:, None] * width_i + i + tl.arange(0, 32)[None, :]


@triton.jit
def _finish(
    sum_NI,
    held_NI,
    out,
    signs,
    n,
    i,
    tokens,
    width_i,
    slope,
    BACKWARD: tl.constexpr,
    SLOPED: tl.constexpr,
    TILE: tl.constexpr,
):
    bit_I = tl.arange(0, 32)[None, :]
    at_N = signs + (i // 32).to(tl.int64) * tokens + n + tl.arange(0, TILE)
    if BACKWARD:
        factor_NI = 2 * tl.sqrt(held_NI.to(tl.float32))
        if SLOPED:
            negative_NI = (tl.load(at_N)[:, None] >> bit_I) & 1 == 0
            factor_NI = tl.where(negative_NI, -slope * factor_NI, factor_NI)
        out_NI = sum_NI * factor_NI
    else:
        if SLOPED:
            tl.store(at_N, tl.sum((sum_NI > 0).to(tl.int32) << bit_I, 1))
        h_NI = tl.where(sum_NI > 0, sum_NI, slope * sum_NI)
        out_NI = h_NI * h_NI
    tl.store(_columns(out, n, i, width_i, TILE), out_NI.to(out.dtype.element_ty))


@triton.jit
def _product(
    rows,
    weight,
    active,
    out,
    signs,
    tokens,
    width_i,
    width_d,
    slope,
    BACKWARD: tl.constexpr,
    SLOPED: tl.constexpr,
    EARLY: tl.constexpr,
    TILE: tl.constexpr,
    TILE_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_n, tiles_i = tl.cdiv(tokens, TILE), tl.cdiv(width_i, TILE)
    for index in tl.range(tl.program_id(0), tiles_n * tiles_i, tl.num_programs(0)):
        tile_n, tile_i = _tile(index, tiles_n, tiles_i, GROUP)
        n, i = tile_n * TILE, tile_i * TILE
        # All four at once, so that their ways to memory overlap.
        if BACKWARD and EARLY:
            a_NI = tl.load(_columns(active, n, i, width_i, TILE))
            b_NI = tl.load(_columns(active, n, i + 32, width_i, TILE))
            c_NI = tl.load(_columns(active, n, i + 64, width_i, TILE))
            d_NI = tl.load(_columns(active, n, i + 96, width_i, TILE))
        sum_NI = tl.zeros((TILE, TILE), dtype=tl.float32)
        for step in range(tl.cdiv(width_d, TILE_D)):
            d = step * TILE_D
            if BACKWARD:
                sum_NI = tl.dot(rows.load([n, d]), weight.load([d, i]), sum_NI)
            else:
                sum_NI = tl.dot(rows.load([n, d]), weight.load([i, d]).T, sum_NI)
        if BACKWARD and not EARLY:
            a_NI = tl.load(_columns(active, n, i, width_i, TILE))
            b_NI = tl.load(_columns(active, n, i + 32, width_i, TILE))
            c_NI = tl.load(_columns(active, n, i + 64, width_i, TILE))
            d_NI = tl.load(_columns(active, n, i + 96, width_i, TILE))
        if not BACKWARD:
            a_NI = 0
            b_NI = 0
            c_NI = 0
            d_NI = 0
        left, right = _halves(sum_NI, TILE // 2)
        first, second = _halves(left, TILE // 4)
        _finish(first, a_NI, out, signs, n, i, tokens, width_i, slope, BACKWARD, SLOPED, TILE)
        _finish(second, b_NI, out, signs, n, i + 32, tokens, width_i, slope, BACKWARD, SLOPED, TILE)
        third, fourth = _halves(right, TILE // 4)
        _finish(third, c_NI, out, signs, n, i + 64, tokens, width_i, slope, BACKWARD, SLOPED, TILE)
        _finish(fourth, d_NI, out, signs, n, i + 96, tokens, width_i, slope, BACKWARD, SLOPED, TILE)


if __name__ == "__main__":
    sys.exit(main())
