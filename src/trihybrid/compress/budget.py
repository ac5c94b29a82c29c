"""Bytes before they are spent: how large a model may be, and which clip makes one small enough.

The integers of a Gaussian row, with the greatest one (g = 2^(b-1) - 1) at k root mean squares, cost
log2(sqrt(2 pi e) g / k) bits a weight after entropy coding (the differential entropy of a Gaussian minus the logarithm
of the step), so a model's bytes fall by one bit a weight whenever k doubles, whatever b is.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Generic, TypeVar

import torch

from trihybrid.compress.section import CompressSection
from trihybrid.models.compact.model import CompactModel
from trihybrid.models.compact.section import CompactSection
from trihybrid.ops.fake_quantize import check_clip, integer_range

FLOAT16_BITS = 16
HIGHEST_CLIP = 64.0
# What the file says of one tensor: name, shape, codec, place and hash as JSON.
LEDGER_BYTES_A_TENSOR = 300

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Fit(Generic[T]):
    """Tensors that are within a limit.

    Attributes:
        clip: what they were quantised with: a multiple of the rows' rms, or the section's own word.
        bytes: their size, as measured.
        margin: limit - bytes, at least 0.
        tensors: what was measured.
    """

    clip: float | str | None
    bytes: int
    margin: int
    tensors: list[T]


@dataclass(frozen=True)
class BudgetRow:
    """One candidate: the value of the field, all parameters, estimated bytes with code, what is left of the limit
    (negative: too large), and whether it is the largest candidate that fits."""

    value: Any
    parameters: int
    bytes: int
    margin: int
    chosen: bool = False

    @property
    def fits(self) -> bool:
        return self.margin >= 0


def fit_to_limit(
    quantise: Callable[[float], list[T]],
    size: Callable[[list[T]], int],
    limit: int,
    lowest: float = 3.0,
    highest: float = HIGHEST_CLIP,
    tolerance: float = 0.005,
) -> Fit[T]:
    """Quantise with the smallest clip k in [lowest, highest] whose `size` is within `limit` bytes.

    k is doubled until it fits and then bracketed, by interpolation in log k (bytes are nearly linear in it) and halving
    in turn: the k that is returned was measured and fits, and some k at least 1 / (1 + tolerance) of it did not (unless
    it is `lowest`). Each attempt is logged, since coding tens of millions of weights takes seconds.
    ValueError when not even `highest` fits, or for a range or tolerance that makes no sense.
    """
    if not 0 < lowest <= highest < math.inf or not tolerance > 0:
        raise ValueError(
            f"lowest is {lowest}, highest {highest} and tolerance {tolerance}; need 0 < lowest <= highest and "
            "tolerance above 0"
        )

    def measure(clip: float) -> Fit[T]:
        tensors = quantise(clip)
        count = size(tensors)
        logger.info("clip %.3f: %s bytes, %s left", clip, f"{count:,}", f"{limit - count:,}")
        return Fit(clip, count, limit - count, tensors)

    below, below_clip = measure(lowest), lowest
    if below.margin >= 0:
        return below
    above, above_clip = below, below_clip
    while above.margin < 0:
        if above_clip >= highest:
            raise ValueError(
                f"compress.limit_bytes is {limit:,}, but the smallest size reached is "
                f"{min(below.bytes, above.bytes):,} bytes (at clip {highest:g}); make the model smaller "
                "(hidden_size, mlp_ratio, layers), or raise the limit"
            )
        below, below_clip = above, above_clip
        above_clip = min(2 * above_clip, highest)
        above = measure(above_clip)
    resolution, halve = math.log1p(tolerance), False
    while (width := math.log(above_clip / below_clip)) > resolution:
        share = 0.5 if halve else below.margin / (below.margin - above.margin)
        # A little to the side that fits, and never next to an end: one of the two ends then closes the bracket.
        step = min(max(share * width + resolution / 3, resolution / 2), width - resolution / 2)
        clip = below_clip * math.exp(step)
        middle = measure(clip)
        if middle.margin < 0:
            below, below_clip = middle, clip
        else:
            above, above_clip = middle, clip
        halve = math.log(above_clip / below_clip) > width / 2
    return above


def entropy_bits(bits: int, clip: float) -> float:
    """log2(sqrt(2 pi e) (2^(bits-1) - 1) / clip), within 0 and `bits`: bits a weight after entropy coding of Gaussian
    rows; a little low once the step is more than the rms (below 2 bits). ValueError for bits (2 to 8) or clip."""
    check_clip(clip)
    greatest = integer_range(bits)[1]
    return min(max(math.log2(math.sqrt(2 * math.pi * math.e) * greatest / clip), 0.0), float(bits))


def bits_by_role(section: CompressSection, columns: int = 512) -> dict[str, float]:
    """Expected bits a weight of every quantised role; 16 where a role stays float16.

    Where no number is given for the clip, it is the median of a Gaussian row's largest magnitude, `columns` wide.
    """
    clip = section.clip
    if not isinstance(clip, float):
        clip = NormalDist().inv_cdf((1 + 0.5 ** (1 / columns)) / 2)
    return {
        role: float(bits) if bits == FLOAT16_BITS else entropy_bits(bits, clip)
        for role, bits in section.bits.items()
    }


def stored_bits(shape: Sequence[int], role: str, section: CompressSection) -> int:
    """Bits of a parameter's stored integers; 16, which is float16, unless it is a matrix of enough elements whose role
    has fewer."""
    large = len(shape) == 2 and math.prod(shape) >= section.small_tensor_elements
    return next((bits for name, bits in section.bits.items() if large and name == role), FLOAT16_BITS)


def estimated_bytes(
    model: CompactModel, section: CompressSection, bits_per_weight: Mapping[str, float]
) -> int:
    """Bytes of the model's tensors and of what the file says about them, without code; shapes are all that is read.

    bits_per_weight: role -> bits of a coded integer (`bits_by_role`, or what an earlier model was measured at).
    """
    roles = model.roles()
    total = 0.0
    for name, parameter in model.named_parameters():
        total += LEDGER_BYTES_A_TENSOR
        if stored_bits(parameter.shape, roles[name], section) < FLOAT16_BITS:
            total += parameter.numel() * bits_per_weight[roles[name]] / 8 + 2 * parameter.shape[0]
        else:
            total += 2 * parameter.numel()
    return math.ceil(total)


def largest_that_fits(
    section: CompactSection,
    vocabulary: int,
    field: str,
    candidates: Sequence[Any],
    limit_bytes: int,
    bits_per_weight: Mapping[str, float] | None = None,
    compress: CompressSection | None = None,
    code_bytes: int = 0,
) -> list[BudgetRow]:
    """Parameters and estimated bytes of a shape for every candidate of one of its fields, in the order given.

    field: a field of CompactSection, as hidden_size, mlp_ratio or pattern.
    bits_per_weight: see `estimated_bytes`; a role that is not named has that of `bits_by_role(compress)`.
    compress: what is quantised; None means the defaults.
    code_bytes: what the code takes from the limit.
    The row with the most parameters that fits is `chosen` (none when none fits). Models are built without memory for
    their weights. ValueError: no such field, no candidate, or a candidate that the section refuses.
    """
    if field not in type(section).model_fields:
        known = ", ".join(type(section).model_fields)
        raise ValueError(f"field is {field!r}, which a compact model does not have; one of {known}")
    if not candidates:
        raise ValueError(f"candidates is empty; give at least one value of {field}")
    compress = compress or CompressSection()
    rows = []
    for value in candidates:
        shape = type(section).model_validate({**section.model_dump(), field: value})
        with torch.device("meta"):
            model = CompactModel(shape, vocabulary)
        bits = {**bits_by_role(compress, shape.hidden_size), **(bits_per_weight or {})}
        total = code_bytes + estimated_bytes(model, compress, bits)
        count = sum(parameter.numel() for parameter in model.parameters())
        rows.append(BudgetRow(value, count, total, limit_bytes - total))
    fitting = [row for row in rows if row.fits]
    largest = max(fitting, key=lambda row: row.parameters, default=None)
    return [replace(row, chosen=row is largest) for row in rows]
