"""A trained compact model as integers with one float16 scale a row.

Every parameter becomes one stored tensor: an integer matrix where its role has bits for that, float16 where the role is
`vector` or `decay`, the tensor is small or not a matrix. Scales are rounded to float16 before the integers are chosen,
so that the weights which are read back are those that were chosen, to the bit.

Legend: N matrices of one shape, R rows, C columns.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from trihybrid.compress.budget import FLOAT16_BITS, HIGHEST_CLIP, Fit, fit_to_limit, stored_bits
from trihybrid.compress.gptq import gptq_round, input_moments, round_to_nearest
from trihybrid.compress.section import CompressSection
from trihybrid.compress.tensors import PlainTensor, QuantisedTensor
from trihybrid.mixers.span import Span
from trihybrid.models.compact.model import CompactModel
from trihybrid.ops.fake_quantize import row_scales, storable_scales

Calibration = Callable[[], Iterable[tuple[Tensor, Span]]]
"""Makes blocks of training text, (tokens_BT, span), on the model's device."""

Clip = float | Literal["search"] | None
Stored = QuantisedTensor | PlainTensor

SEARCHED_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Shares of a row's largest magnitude among which `clip: search` chooses."""

# Where rate control starts when no number was given: about a Gaussian row's largest magnitude in units of its rms.
FIRST_FITTED_CLIP = 3.0

logger = logging.getLogger(__name__)


def quantise_model(
    model: CompactModel, section: CompressSection, calibration: Calibration | None
) -> list[Stored]:
    """Every parameter of the model, once, in the order of `named_parameters`, on the CPU; the model is not changed.

    calibration: asked once, when `section.gptq`; whole blocks are read until `calibration_tokens` tokens were seen.
    Rate control (`section.fit`) is `quantise_to_limit`'s.
    ValueError: gptq without calibration, a parameter that is not finite, or one without a role.
    """
    return _quantise(model, section, _moments(model, section, calibration), section.clip)


def quantise_to_limit(
    model: CompactModel,
    section: CompressSection,
    calibration: Calibration | None,
    size: Callable[[list[Stored]], int],
) -> Fit[Stored]:
    """`quantise_model`, and again with a larger clip while `size` (code, ledger and all) is above `limit_bytes`.

    The inputs are looked at once, whatever the number of attempts. ValueError: as in `quantise_model`; too large and
    `section.fit` is false; or too large at any clip.
    """
    moments = _moments(model, section, calibration)
    limit, lowest = section.limit_bytes, section.clip
    if not section.fit or not isinstance(lowest, float):
        tensors = _quantise(model, section, moments, section.clip)
        count = size(tensors)
        if count <= limit:
            return Fit(section.clip, count, limit - count, tensors)
        if not section.fit:
            raise ValueError(
                f"compress.limit_bytes is {limit:,}, but the model takes {count:,} at clip {section.clip}; set "
                "compress.fit: true, give fewer bits, or train a smaller model"
            )
        logger.info("clip %s takes %s bytes, above %s: fitting", section.clip, f"{count:,}", f"{limit:,}")
        lowest = FIRST_FITTED_CLIP
    highest = max(HIGHEST_CLIP, lowest)
    return fit_to_limit(lambda clip: _quantise(model, section, moments, clip), size, limit, lowest, highest)


def searched_scales(weight_RC: Tensor, bits: int, importance_C: Tensor | None) -> Tensor:
    """Of the scales that put a share in `SEARCHED_SHARES` of a row's largest magnitude on the greatest integer, the one
    of least sum_c h_c (w_c - q_c s)^2, float32 [R]; h is `importance_C` [C], >= 0, or 1."""
    widest_R = row_scales(weight_RC, bits, None)
    best_R, least_R = widest_R, torch.full_like(widest_R, torch.inf)
    for share in SEARCHED_SHARES:
        scale_R = storable_scales(widest_R * share)
        value_RC = round_to_nearest(weight_RC, scale_R, bits) * scale_R[:, None]
        square_RC = (weight_RC.float() - value_RC).square()
        error_R = square_RC.sum(1) if importance_C is None else square_RC @ importance_C.float()
        better_R = error_R < least_R
        best_R, least_R = torch.where(better_R, scale_R, best_R), torch.where(better_R, error_R, least_R)
    return best_R


def _moments(
    model: CompactModel, section: CompressSection, calibration: Calibration | None
) -> dict[str, Tensor]:
    """Parameter name -> X^T X; empty without gptq."""
    if not section.gptq:
        return {}
    if calibration is None:
        raise ValueError("compress.gptq is true, which needs calibration text; give some, or set it to false")
    moments = input_moments(model, calibration(), section.calibration_tokens)
    return {f"{name}.weight": moment for name, moment in moments.items()}


@torch.no_grad()
def _quantise(
    model: CompactModel, section: CompressSection, moments: Mapping[str, Tensor], clip: Clip
) -> list[Stored]:
    parameters, roles = dict(model.named_parameters()), model.roles()
    widths: dict[str, int] = {}
    scales: dict[str, Tensor] = {}
    integers: dict[str, Tensor] = {}
    groups: dict[tuple[torch.Size, int], list[str]] = {}
    for name, parameter in parameters.items():
        _check(name, parameter, roles)
        bits = stored_bits(parameter.shape, roles[name], section)
        if bits == FLOAT16_BITS:
            continue
        widths[name], scales[name] = (
            bits,
            _scales(parameter, bits, clip, section.step_floor, moments.get(name)),
        )
        if name in moments:
            groups.setdefault((parameter.shape, bits), []).append(name)
        else:
            integers[name] = round_to_nearest(parameter, scales[name], bits)
    # All matrices of a shape at once: the loop over columns costs the same for one and for many.
    for (_, bits), names in groups.items():
        chosen_NRC = gptq_round(
            torch.stack([parameters[name] for name in names]),
            torch.stack([moments[name] for name in names]),
            torch.stack([scales[name] for name in names]),
            bits,
        )
        integers.update(zip(names, chosen_NRC.unbind(), strict=True))
    return [
        QuantisedTensor(name, integers[name].cpu(), scales[name].half().cpu(), widths[name])
        if name in integers
        else PlainTensor(name, _plain(name, parameter.detach()))
        for name, parameter in parameters.items()
    ]


def _scales(parameter: Tensor, bits: int, clip: Clip, floor: float, moment_CC: Tensor | None) -> Tensor:
    if isinstance(clip, str):
        importance_C = None if moment_CC is None else moment_CC.diagonal()
        return storable_scales(searched_scales(parameter, bits, importance_C).clamp(min=floor))
    return storable_scales(row_scales(parameter, bits, clip, floor))


def _plain(name: str, values: Tensor) -> Tensor:
    if values.numel() and values.abs().max() > torch.finfo(torch.float16).max:
        logger.info("%s does not fit float16 and is stored in float32", name)
        return values.float().cpu()
    return values.half().cpu()


def _check(name: str, parameter: nn.Parameter, roles: Mapping[str, str]) -> None:
    if name not in roles:
        raise ValueError(f"{name} has no role; the model's roles() must name every parameter")
    if not bool(torch.isfinite(parameter).all()):
        raise ValueError(
            f"{name} holds numbers that are not finite; the training diverged, nothing is stored"
        )
