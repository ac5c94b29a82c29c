"""Symmetric integers with one step a row, and training that looks through them.

The stored number of a weight w in a row of scale s is q = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1), its value q s;
round goes to the even neighbour at a half. Fake quantisation puts q s into the forward and passes the gradient straight
through (Bengio et al. 2013, https://arxiv.org/abs/1308.3432), with the very scales that an export stores. Everything
here traces without a graph break: the switch is a tensor, since a Python flag is a constant to a compiler and the
quantisation behind it dead code.

Legend: R rows, C columns; b bits.
"""

import math

import torch
from torch import Tensor

BITS = (2, 8)
"""Fewest and most bits of a stored integer; it lies in an int8."""

# float16: 10 bits of fraction (float32 has 23), numbers below 2^-14 are multiples of 2^-24, none is above 65504.
_FRACTION_MASK = 0x1FFF
_SMALLEST_NORMAL = 2.0**-14
_SMALLEST = 2.0**-24
_LARGEST = 65504.0

_TINY = torch.finfo(torch.float32).tiny


def integer_range(bits: int) -> tuple[int, int]:
    """Least and greatest integer of `bits` bits, (-2^(b-1), 2^(b-1) - 1). ValueError unless bits is 2 to 8."""
    if not BITS[0] <= bits <= BITS[1]:
        raise ValueError(f"bits is {bits}; a quantised weight has {BITS[0]} to {BITS[1]} (6 is usual)")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def row_scales(weight_RC: Tensor, bits: int, clip: float | None, floor: float = 0.0) -> Tensor:
    """The step of every row, float32 [R], above 0; no gradient.

    weight_RC: [R, C], finite, any floating dtype.
    clip: None puts the row's largest magnitude on the greatest integer, s = max|w| / (2^(b-1) - 1). A number k above 0
        puts k root mean squares there, s = k rms(w) / (2^(b-1) - 1): below about 3 the tails are cut off, above that
        the outer integers stay unused and a larger k costs fewer bits after entropy coding, about log2(k) less
        a weight ("SDClip" of the parameter-golf records: the size is set by k and hardly by the bits).
    floor: the least step, at least 0; most of those records have 1 / (2^(b-1) - 1), a rate control of its own.
    A row of zeros has scale 1. ValueError for bits or clip outside of these, or when the weight is not a matrix.
    """
    _check_matrix(weight_RC)
    check_clip(clip)
    greatest = integer_range(bits)[1]
    wide_RC = weight_RC.detach().float()
    top_R = wide_RC.abs().amax(1)
    if clip is None:
        reach_R = top_R
    else:
        # Divided by its largest first: the squares of a tiny row would all be zero.
        unit_RC = wide_RC / torch.where(top_R > 0, top_R, 1.0)[:, None]
        reach_R = clip * top_R * unit_RC.square().mean(1).sqrt()
    return torch.where(top_R > 0, (reach_R / greatest).clamp(min=max(floor, _TINY)), 1.0)


def storable_scales(scale_R: Tensor) -> Tensor:
    """Every scale rounded up to the next float16 number, as float32 of the same shape, in [2^-24, 65504].

    Up, so that no weight leaves the range of integers for the sake of storage. Values are exact in float16, so that a
    scale read from a file is the one that was quantised with. scale_R: float32 above 0, no NaN.
    """
    # Bits and not .half().float(): a compiler that fuses both casts takes them for nothing.
    coarse_R = ((scale_R.contiguous().view(torch.int32) + _FRACTION_MASK) & ~_FRACTION_MASK).view(
        torch.float32
    )
    multiple_R = torch.ceil(scale_R * (1 / _SMALLEST)) * _SMALLEST
    return torch.where(scale_R < _SMALLEST_NORMAL, multiple_R, coarse_R).clamp(_SMALLEST, _LARGEST)


def fake_quantize(
    weight_RC: Tensor, bits: int, clip: float | None, active: Tensor | None, floor: float = 0.0
) -> Tensor:
    """w + active (q s - w), where only w carries a gradient: [R, C] in the weight's dtype.

    weight_RC: [R, C], any floating dtype; integers and scales are computed in float32.
    bits, clip, floor: as in `row_scales`; the scales are those of `storable_scales`.
    active: a floating tensor of no dimensions on the weight's device, 1 quantises, 0 returns the weight, between them
        a blend; None quantises always. Fill it in place to switch: a compiled graph reads it at every call.
    The gradient of the result is the gradient of the weight, whatever `active` is.
    ValueError for bits, clip or a shape outside of these.
    """
    if active is not None and (active.dim() != 0 or not active.is_floating_point()):
        raise ValueError(
            f"active is {active.dtype} {list(active.shape)}; it must be one floating number, torch.tensor(0.0)"
        )
    scale_R = storable_scales(row_scales(weight_RC, bits, clip, floor))
    low, high = integer_range(bits)
    detached_RC = weight_RC.detach()
    value_RC = torch.clamp(torch.round(detached_RC.float() / scale_R[:, None]), low, high) * scale_R[:, None]
    dtype = torch.promote_types(weight_RC.dtype, torch.float32)
    change_RC = value_RC.to(dtype) - detached_RC.to(dtype)
    if active is not None:
        change_RC = active.detach().to(dtype) * change_RC
    return (weight_RC.to(dtype) + change_RC).to(weight_RC.dtype)


def check_clip(clip: float | None) -> None:
    """ValueError unless clip is None or a finite number above 0."""
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(
            f"clip is {clip}; it must be above 0, the multiple of a row's rms that the greatest integer stands for "
            "(12.85 is usual for 6 bits), or None for the row's largest magnitude"
        )


def _check_matrix(weight_RC: Tensor) -> None:
    if weight_RC.dim() != 2 or not weight_RC.is_floating_point():
        raise ValueError(
            f"the weight is {weight_RC.dtype} {list(weight_RC.shape)}; only floating matrices [R, C] are quantised"
        )
