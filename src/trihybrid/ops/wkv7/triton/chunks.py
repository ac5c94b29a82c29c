"""What all kernels of the chunked WKV-7 share: where the rows of a chunk lie, its decays, and where documents start.

Legend: B batch, T time, H heads, K key width, V value width, C tokens of a chunk, N chunks of all batches and heads.
"""

import triton
import triton.language as tl
from torch import Tensor

# e^{c - m} and its inverse must be floats: half a chunk of log_w stays above -80. At C = 16 that is log_w >= -10, and
# a decay of e^-10 instead of a smaller one is far below the rounding of float16.
LARGEST_EXPONENT = 80.0
BITS = tl.constexpr(1.4426950408889634)  # of e; exp2 is the instruction that a GPU has


def steepest(chunk: int) -> float:
    """The smallest log_w that a chunk of C tokens tells from smaller ones."""
    return -LARGEST_EXPONENT / (chunk // 2)


def strides(x_BTHD: Tensor) -> tuple[int, int, int]:
    """Of batch, time and head; the last dimension is contiguous."""
    return x_BTHD.stride(0), x_BTHD.stride(1), x_BTHD.stride(2)


@triton.jit
def rows(x, stride_b, stride_t, stride_h, b, h, t, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers [COUNT, WIDTH] to the tokens from t on; b, h and t are int64."""
    base = x + b * stride_b + h * stride_h + t * stride_t
    return base + tl.arange(0, COUNT)[:, None] * stride_t + tl.arange(0, WIDTH)[None, :]


@triton.jit
def columns(x, stride_b, stride_t, stride_h, b, h, t, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """The same pointers, transposed: [WIDTH, COUNT]."""
    base = x + b * stride_b + h * stride_h + t * stride_t
    return base + tl.arange(0, COUNT)[None, :] * stride_t + tl.arange(0, WIDTH)[:, None]


@triton.jit
def tile(x, index, ROWS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Pointers to the first COUNT columns of tile number `index` (int64) of an array of dense [ROWS, WIDTH] tiles."""
    return x + index * (ROWS * WIDTH) + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, COUNT)[None, :]


@triton.jit
def plane(x, which, count, SIZE: tl.constexpr):
    """Pointer to one of several arrays of `count` (int64) tiles of SIZE elements that lie behind each other."""
    return x + which * count * SIZE


@triton.jit
def inside(t, length, C: tl.constexpr, WHOLE: tl.constexpr):
    """bool [C, 1]: which tokens from t on there are; all of them, without looking, where chunks are WHOLE."""
    if WHOLE:  # noqa: SIM108
        inside_C1 = tl.full((C, 1), 1, tl.int1)
    else:
        inside_C1 = (t + tl.arange(0, C) < length)[:, None]
    return inside_C1


@triton.jit
def documents(reset, b, t, length, C: tl.constexpr, HAS_RESET: tl.constexpr):
    """Which tokens start a document, and how many did since the chunk began, this one counted; int32 [C]."""
    i_C = tl.arange(0, C)
    if HAS_RESET:
        starts_C = tl.load(reset + b * length + t + i_C, mask=t + i_C < length, other=0).to(tl.int32)
        document_C = tl.cumsum(starts_C, 0)
    else:
        starts_C = tl.zeros((C,), tl.int32)
        document_C = starts_C
    return starts_C, document_C


@triton.jit
def recurrent(k_CK, a_CK, b_CK, w_CK, GROUPED: tl.constexpr):
    """k, a and b of the recurrence in float32, from what was loaded: themselves, or with GROUPED k, kk, iclr and log_w,
    of which k (1 - exp(log_w) + iclr), -kk and kk iclr are made."""
    k_CK, a_CK, b_CK = k_CK.to(tl.float32), a_CK.to(tl.float32), b_CK.to(tl.float32)
    if GROUPED:
        k_CK *= 1.0 - tl.exp2(w_CK.to(tl.float32) * BITS) + b_CK
        b_CK *= a_CK
        a_CK = -a_CK
    return k_CK, a_CK, b_CK


@triton.jit
def exponents(w_CK, starts_C, STEEPEST: tl.constexpr, C: tl.constexpr):
    """log_w, zero beyond the end, as used [C, K], and as powers of two its sums c up to each token [C, K], and m = c in
    the middle of the chunk and c at its end [1, K]; float32.

    The first token of a document decays nothing, whatever its log_w holds, nor does padding. A NaN stays one.
    """
    # TF32 holds all digits of bfloat16.
    exact: tl.constexpr = w_CK.dtype == tl.bfloat16
    w_CK = tl.where(starts_C[:, None] > 0, 0.0, w_CK.to(tl.float32))
    w_CK = tl.where(w_CK < STEEPEST, STEEPEST, w_CK)
    early_C1 = (tl.arange(0, C) < C // 2)[:, None]
    middle_1K = tl.sum(tl.where(early_C1, w_CK, 0.0), 0, keep_dims=True)
    c_CK = running(w_CK, C, False, exact) * BITS
    return w_CK, c_CK, middle_1K * BITS, tl.sum(w_CK, 0, keep_dims=True) * BITS


@triton.jit
def pairs(document_C, STRICT: tl.constexpr, C: tl.constexpr):
    """bool [C, C]: token j of the column reaches token i of the row, j <= i, or j < i when STRICT."""
    i_C = tl.arange(0, C)
    if STRICT:  # noqa: SIM108, since the kernel language has no such expression of blocks
        before_CC = i_C[:, None] > i_C[None, :]
    else:
        before_CC = i_C[:, None] >= i_C[None, :]
    return before_CC & (document_C[:, None] == document_C[None, :])


@triton.jit
def running(x_CK, C: tl.constexpr, REVERSE: tl.constexpr, SHORT: tl.constexpr):
    """Sums over tokens up to each one, or from each one on, float32, as a product with a triangle of ones, so that no
    thread waits for another. SHORT: x has no more digits than TF32 holds; if not, it is split in three."""
    i_C = tl.arange(0, C)
    if REVERSE:  # noqa: SIM108, since the kernel language has no such expression of blocks
        ones_CC = i_C[:, None] <= i_C[None, :]
    else:
        ones_CC = i_C[:, None] >= i_C[None, :]
    if SHORT:
        sums_CK = tl.dot(ones_CC.to(tl.float32), x_CK, input_precision="tf32")
    else:
        sums_CK = tl.dot(ones_CC.to(tl.float32), x_CK, input_precision="tf32x3")
    return sums_CK
