"""What the kernels do before and behind a product, as `decode_product.Before` and `Finish` say."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.decode_product import Before, Finish
from trihybrid.ops.tanh import tanh

CODES = {"none": 0, "gated": 1, "times": 2, "ranks": 3, "logits": 4}
GATED, TIMES, RANKED = (tl.constexpr(CODES[kind]) for kind in ("gated", "times", "ranks"))


@dataclass(frozen=True)
class Outputs:
    """What a kernel is told of its outputs.

    Attributes:
        o_BF: where they go.
        pointers: the weights, those of the second half, the factors; where one is not there another stands in.
        other_b: stride of the factors' rows.
        numbers: the cap and the borders.
        flags: KIND, SILU, CAPPED.
    """

    o_BF: Tensor
    pointers: list[Tensor]
    other_b: int
    numbers: list[float]
    flags: dict[str, Any]


def outputs_of(finish: Finish, x_BI: Tensor, weight_OI: Tensor) -> Outputs:
    """New outputs of a product of x_BI."""
    count, other_BO = weight_OI.shape[0], finish.other_BO
    if finish.kind == "gated":
        count //= 2
    return Outputs(
        x_BI.new_empty(len(x_BI), count, dtype=torch.float32 if finish.kind == "logits" else x_BI.dtype),
        [
            weight_OI,
            weight_OI[count:] if finish.kind == "gated" else weight_OI,
            x_BI if other_BO is None else other_BO,
        ],
        0 if other_BO is None else other_BO.stride(0),
        [finish.cap or 0.0, *finish.borders],
        {"KIND": CODES[finish.kind], "SILU": finish.activation == "silu", "CAPPED": finish.cap is not None},
    )


def parts_of(before: Before, stand_in: Tensor) -> tuple[list[Tensor], list[float], dict[str, Any]]:
    """Pointers, epsilons and flags for a kernel. What is not there is never read; `stand_in` takes its place."""
    y_weight = None if before.y_gain is None else before.y_gain.weight
    x_weight = None if before.gain is None else before.gain.weight
    pointers = [
        stand_in if part is None else part for part in (before.y_BD, y_weight, before.scalar, x_weight)
    ]
    epsilons = [0.0 if gain is None else gain.epsilon for gain in (before.y_gain, before.gain)]
    flags = {
        "ADDED": before.y_BD is not None, "Y_NORMED": before.y_gain is not None, "Y_WEIGHT": y_weight is not None,
        "SCALED": before.scalar is not None, "NORMED": before.gain is not None, "WEIGHT": x_weight is not None,
    }  # fmt: skip
    return pointers, epsilons, flags


def moves(before: Before) -> bool:
    """Whether the stream behind it is another one."""
    return before.y_BD is not None or before.scalar is not None


@triton.jit
def gains(pointer, wide_1D, in_1D, PRESENT: tl.constexpr):
    """A norm's weights, which no former kernel writes."""
    weight_1D = tl.zeros(wide_1D.shape, tl.float32)
    if PRESENT:
        weight_1D = tl.load(pointer + wide_1D, mask=in_1D, other=0.0).to(tl.float32)
    return weight_1D


@triton.jit
def factor_of(scalar, PRESENT: tl.constexpr):
    """A layer's, which no former kernel writes."""
    factor = 1.0
    if PRESENT:
        factor = tl.load(scalar).to(tl.float32)
    return factor


@triton.jit
def moved(
    x, y, y_weight_1D, factor, at_1D, in_1D, width, epsilon,
    ADDED: tl.constexpr, Y_NORMED: tl.constexpr, Y_WEIGHT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """x', one row of the stream."""
    x_1D = tl.load(x + at_1D, mask=in_1D, other=0.0).to(tl.float32)
    if ADDED:
        y_1D = tl.load(y + at_1D, mask=in_1D, other=0.0).to(tl.float32)
        if Y_NORMED:
            y_1D *= tl.rsqrt(tl.sum(y_1D * y_1D, 1) / width + epsilon)[:, None]
        if Y_WEIGHT:
            y_1D *= y_weight_1D
        x_1D += y_1D
    if SCALED:
        x_1D *= factor
    return x_1D


@triton.jit
def normed(x_1D, weight_1D, width, epsilon, NORMED: tl.constexpr, WEIGHT: tl.constexpr):
    """z, the product's input."""
    if NORMED:
        x_1D *= tl.rsqrt(tl.sum(x_1D * x_1D, 1) / width + epsilon)[:, None]
    if WEIGHT:
        x_1D *= weight_1D
    return x_1D


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
