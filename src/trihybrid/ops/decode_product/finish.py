"""What the kernels do to the outputs of a product, as `decode_product.Finish` says."""

import triton
import triton.language as tl

from trihybrid.ops.tanh import tanh

NONE, GATED, TIMES, RANKED, LOGITS = (tl.constexpr(code) for code in range(5))
KINDS = {"none": 0, "gated": 1, "times": 2, "ranks": 3, "logits": 4}


@triton.jit
def finished(
    o, up, other, wide, cap, tanh_from, sigmoid_from, KIND: tl.constexpr, SILU: tl.constexpr, CAPPED: tl.constexpr
):  # fmt: skip
    """Outputs of any shape. `up` are those of the second half, `other` the factors, `wide` their numbers."""
    if KIND == GATED:
        o = activated(o, SILU) * up
    if KIND == TIMES:
        o = activated(o, SILU) * other
    if KIND == RANKED:
        bent = tl.where((wide >= tanh_from) & (wide < sigmoid_from), tanh(o), tl.sigmoid(o))
        o = tl.where(wide < tanh_from, o, bent)
    if CAPPED:
        o = cap * tanh(o / cap)
    return o


@triton.jit
def activated(x, SILU: tl.constexpr):
    """silu, or gelu in its tanh form: 0.5 x (1 + tanh(u)) = x sigmoid(2 u)."""
    u = x
    if not SILU:
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(u)
