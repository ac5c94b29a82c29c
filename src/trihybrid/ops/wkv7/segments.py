"""WKV-7 over one long sequence in segments that run side by side, where batch and heads alone leave a GPU half empty.

Shapes: B batch, T time, H heads, K key width, V value width. `parts` holds the maths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trihybrid.ops.wkv7 import wkv7
from trihybrid.ops.wkv7.parts import wkv7_parts

# Two passes for the maps and one for the outputs: fewer segments at once than this gain nothing.
PASSES = 3
# Shorter segments are all joints: composing two maps costs as much as some hundred tokens.
SHORTEST_SEGMENT = 128


@dataclass(frozen=True)
class _Rows:
    """The segments of a sequence are neighbouring rows of a batch of B `count` rows."""

    count: int

    def gather(self, own: Tensor) -> Tensor:
        return own.unflatten(0, (-1, self.count)).transpose(0, 1)

    def take(self, every_P: Tensor) -> Tensor:
        return every_P.transpose(0, 1).flatten(0, 1)

    def total(self, x: Tensor) -> Tensor:
        return x


def segments_for(batch: int, heads: int, length: int, value_blocks: int, processors: int) -> int:
    """How many segments could make `wkv7_segments` faster than the plain operator; 1 when it could not.

    A kernel runs batch x heads x value_blocks programs, each of them a serial walk over `length` tokens. The segments
    are the largest power of two that leaves no more than two programs a processor and 128 tokens a segment; 3 passes
    over the tokens instead of one have to be won back, so fewer than 4 are none. A guess, to be measured.

    batch, heads, length, processors (of the GPU): at least 1. value_blocks: into how many programs a kernel cuts the
    values of one head, at least 1. ValueError, naming the argument, for less.
    """
    for name, value in (
        ("batch", batch),
        ("heads", heads),
        ("length", length),
        ("value_blocks", value_blocks),
        ("processors", processors),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    most = min(2 * processors // (batch * heads * value_blocks), length // SHORTEST_SEGMENT)
    return 1 << (most.bit_length() - 1) if most > PASSES else 1


@torch.compiler.disable
def wkv7_segments(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    reset_BT: Tensor | None = None,
    segments: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv7` with time cut into segments that run as extra rows of the batch: same arguments, results and gradients.

    segments: at least 1, which is `wkv7` itself. All are of one length, the last one filled up with tokens that do
        nothing; there are fewer where that many do not fit. A T that is a multiple of `segments` saves a copy of all.

    Twice differentiating it is a RuntimeError. ValueErrors as in `wkv7`, and for `segments` below 1.
    """
    if segments < 1:
        raise ValueError(f"segments is {segments}; it must be at least 1")
    tensors = (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    time = r_BTHK.shape[1] if r_BTHK.dim() == 4 else 1
    length = -(-time // segments) or 1
    count = -(-time // length)
    if count <= 1:
        return wkv7(*tensors, state_BHKV, reset_BT, backend)
    outer = r_BTHK.shape[:3]
    names = ("log_w_BTHK", "k_BTHK", "v_BTHV", "a_BTHK", "b_BTHK")
    for name, x in zip(names, tensors[1:], strict=True):
        if x.dim() != 4 or x.shape[:3] != outer:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected {tuple(outer)} and a width, as in r_BTHK"
            )
    if reset_BT is not None and reset_BT.shape != outer[:2]:
        raise ValueError(f"reset_BT has shape {tuple(reset_BT.shape)}; expected {tuple(outer[:2])}")

    def cut(x_BTX: Tensor) -> Tensor:
        missing = count * length - time
        if missing:
            x_BTX = torch.cat([x_BTX, x_BTX.new_zeros(len(x_BTX), missing, *x_BTX.shape[2:])], 1)
        return x_BTX.unflatten(1, (count, length)).flatten(0, 1)

    reset_RT = None if reset_BT is None else cut(reset_BT)
    r, log_w, k, v, a, b = (cut(x) for x in tensors)
    o_RTHV, final_BHKV = wkv7_parts(r, log_w, k, v, a, b, state_BHKV, reset_RT, _Rows(count), backend)
    return o_RTHV.unflatten(0, (-1, count)).flatten(1, 2)[:, :time], final_BHKV
