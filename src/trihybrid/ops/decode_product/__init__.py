"""Products of a few rows with a weight matrix, and what stands around them in a decoding step: one launch each, or two
where several rows have something before them.

    x' = (x + n_y(y)) s          the residual stream behind the last branch: y that branch, s a layer's scalar
    z = n_x(x')                  the input of the next product
    o = finish(z W^T)            activation(gate) up, activation(gate) p, tanh and sigmoid of some rows, a softcap

Bound by the bytes of W: of each product they are read once, for all rows (of `raised`, once for each). The kernels of
`triton` (one row) and `several` take half precision on a GPU and at most `MOST_ROWS` rows; everywhere else these are
torch's operators. One row is rounded at the end alone, several before their product too. `sizes` has the blocks.

Legend: B rows, D width of the stream, I inputs, O outputs, F outputs behind the finish, R rank of a group, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, rms_norm, silu

from trihybrid.ops.softcap import softcap

__all__ = ["MOST_ROWS", "Before", "Finish", "Gain", "fits", "normed_product", "product", "raised"]

MOST_ROWS = 8  # of a tile in `several`
WIDEST = 8192  # a program holds whole rows of the stream, in registers
ACTIVATIONS = {"gelu": lambda x: gelu(x, approximate="tanh"), "silu": silu}


@dataclass(frozen=True)
class Gain:
    """An RMS norm: x / sqrt(mean(x^2) + epsilon) weight.

    Attributes:
        weight: [D], or None for ones.
        epsilon: above zero.
    """

    weight: Tensor | None
    epsilon: float

    def __call__(self, x_BD: Tensor) -> Tensor:
        wide_BD = _wide(x_BD)
        weight = None if self.weight is None else self.weight.to(wide_BD.dtype)
        return rms_norm(wide_BD, x_BD.shape[-1:], weight, self.epsilon).to(x_BD.dtype)


@dataclass(frozen=True)
class Before:
    """What happens to the stream before a product; nothing where a part is None.

    Attributes:
        y_BD: the branch that is added.
        y_gain: its norm.
        scalar: [1], factor of the sum.
        gain: the norm of the product's input.
    """

    y_BD: Tensor | None = None
    y_gain: Gain | None = None
    scalar: Tensor | None = None
    gain: Gain | None = None


@dataclass(frozen=True)
class Finish:
    """What happens to a product's outputs.

    Attributes:
        kind: `none`; `gated`, activation(first half) second half; `times`, activation(o) times `other_BO`; `ranks`,
            tanh from row `borders[0]` and sigmoid from row `borders[1]` on; `logits`, float32, softcapped where there
            is a `cap`.
        activation: of `gated` and `times`, `gelu` (its tanh form) or `silu`.
    """

    kind: Literal["none", "gated", "times", "ranks", "logits"] = "none"
    activation: str = "gelu"
    other_BO: Tensor | None = None
    borders: tuple[int, int] = (0, 0)
    cap: float | None = None


def fits(x_BI: Tensor) -> bool:
    """Whether the kernels take this input: a GPU, half precision, at most MOST_ROWS rows."""
    return x_BI.is_cuda and x_BI.dtype in (torch.bfloat16, torch.float16) and x_BI.shape[0] <= MOST_ROWS


def product(x_BI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T, [B, O]. Both are dense in I."""
    if fits(x_BI):
        from trihybrid.ops.decode_product.triton import launch_product

        return launch_product(x_BI, weight_OI)
    return linear(x_BI, weight_OI)


def normed_product(x_BD: Tensor, weight_OD: Tensor, before: Before, finish: Finish) -> tuple[Tensor, Tensor]:
    """The stream x' [B, D], a new tensor, and the finished product [B, F].

    Args:
        x_BD: the stream, dense.
        weight_OD: dense; of `gated` the gate's rows, then as many of the other.
    """
    if fits(x_BD):
        from trihybrid.ops.decode_product.triton import launch_normed

        return launch_normed(x_BD, weight_OD, before, finish)
    after_BD = x_BD
    if before.y_BD is not None:
        after_BD = x_BD + (before.y_BD if before.y_gain is None else before.y_gain(before.y_BD))
    if before.scalar is not None:
        after_BD = after_BD * before.scalar
    z_BD = after_BD if before.gain is None else before.gain(after_BD)
    return after_BD, _finished(linear(z_BD, weight_OD), finish)


def raised(x_BP: Tensor, first: int, weights: Sequence[Tensor]) -> Tensor:
    """Several small products of neighbouring parts of the input, [B, sum C]: part j, R_j wide, times weights[j].

    Args:
        x_BP: rows, dense in P.
        first: where the first part begins; each next one begins where the last ends.
        weights: [R_j, C_j], at most four, one behind the other in one tensor.
    """
    if fits(x_BP):
        from trihybrid.ops.decode_product.triton import launch_raised

        return launch_raised(x_BP, first, weights)
    parts = []
    for weight_RC in weights:
        parts.append(x_BP[:, first : first + len(weight_RC)] @ weight_RC)
        first += len(weight_RC)
    return torch.cat(parts, -1)


def _finished(o_BO: Tensor, finish: Finish) -> Tensor:
    if finish.kind == "gated":
        gate, up = o_BO.chunk(2, -1)
        return ACTIVATIONS[finish.activation](gate) * up
    if finish.kind == "times":
        assert finish.other_BO is not None
        return ACTIVATIONS[finish.activation](o_BO) * finish.other_BO
    if finish.kind == "ranks":
        plain, tanh, sigmoid = o_BO.tensor_split(finish.borders, -1)
        return torch.cat([plain, tanh.tanh(), sigmoid.sigmoid()], -1)
    return softcap(_wide(o_BO), finish.cap) if finish.kind == "logits" else o_BO


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
