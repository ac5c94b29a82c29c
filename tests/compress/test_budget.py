"""Fitting to a limit finds the smallest clip; estimates of bytes agree with a hand count."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.compress.budget import (
    LEDGER_BYTES_A_TENSOR,
    bits_by_role,
    entropy_bits,
    fit_to_limit,
    largest_that_fits,
    stored_bits,
)
from trihybrid.compress.section import CompressSection
from trihybrid.models.compact.model import CompactModel
from trihybrid.models.compact.section import CompactSection
from trihybrid.ops.fake_quantize import fake_quantize, row_scales

TINY = CompactSection(
    hidden_size=32, pattern="TWF", heads=2, kv_heads=1, head_dim=16, value_embedding_layers=[2]
)


def logarithmic(clip: float) -> list[float]:
    """Stands for tensors: 1,000,000 weights that cost 7.5 - log2(k) bits each."""
    return [1e6 * max(7.5 - math.log2(clip), 0.4) / 8]


def size(tensors: list[float]) -> int:
    return round(sum(tensors))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(250_000, 730_000), st.sampled_from([0.001, 0.005, 0.1]))
def test_the_smallest_clip_that_fits_is_found(limit: int, tolerance: float) -> None:
    attempts: list[float] = []

    def quantise(clip: float) -> list[float]:
        attempts.append(clip)
        return logarithmic(clip)

    fit = fit_to_limit(quantise, size, limit, tolerance=tolerance)
    exact = 2 ** (7.5 - 8 * limit / 1e6)
    assert exact * 0.9999 <= fit.clip <= exact * (1 + tolerance) * 1.0001
    assert fit.bytes == size(fit.tensors) == limit - fit.margin <= limit
    assert fit.clip in attempts
    assert (
        max(clip for clip in attempts if size(logarithmic(clip)) > limit) * (1 + tolerance)
        >= fit.clip * 0.9999
    )
    assert len(attempts) <= 12


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.floats(3.0, 64.0), st.floats(0.0, 0.999))
def test_a_size_with_a_cliff_is_fitted_too(cliff: float, share: float) -> None:
    """Interpolation is of no use here; halving in turn still ends."""
    attempts: list[float] = []

    def quantise(clip: float) -> list[float]:
        attempts.append(clip)
        return [1000.0 if clip < cliff else share * 100.0]

    fit = fit_to_limit(quantise, size, 100, tolerance=0.005)
    assert cliff <= fit.clip <= max(cliff * 1.0051, 3.0)
    assert len(attempts) <= 30


def test_what_fits_at_once_is_left_alone() -> None:
    fit = fit_to_limit(logarithmic, size, 10**9, lowest=5.0)
    assert (fit.clip, fit.margin) == (5.0, 10**9 - size(logarithmic(5.0)))


def test_a_limit_out_of_reach_says_what_was_reached() -> None:
    smallest = f"{size(logarithmic(64.0)):,}"
    with pytest.raises(ValueError, match=rf"limit_bytes is 1,000.* {smallest} bytes .*hidden_size"):
        fit_to_limit(logarithmic, size, 1000)


@pytest.mark.parametrize(
    ("lowest", "highest", "tolerance"), [(0.0, 1.0, 0.1), (2.0, 1.0, 0.1), (1.0, 2.0, 0.0)]
)
def test_a_senseless_range_is_refused(lowest: float, highest: float, tolerance: float) -> None:
    with pytest.raises(ValueError, match="lowest is"):
        fit_to_limit(logarithmic, size, 1000, lowest, highest, tolerance)


def test_real_rows_are_fitted_by_their_entropy() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))

    def quantise(clip: float) -> list[torch.Tensor]:
        return [(fake_quantize(weight, 6, clip, None) / row_scales(weight, 6, clip)[:, None]).round()]

    def entropy(tensors: list[torch.Tensor]) -> int:
        counts = torch.bincount(tensors[0].long().flatten() + 32)
        share = counts[counts > 0] / weight.numel()
        return math.ceil(-(share * share.log2()).sum().item() * weight.numel() / 8)

    fit = fit_to_limit(quantise, entropy, 4 * weight.numel() // 8)
    assert fit.clip == pytest.approx(8.0, rel=0.03)
    assert 0 <= fit.margin < 0.005 * weight.numel()


def test_entropy_by_hand() -> None:
    assert entropy_bits(6, 12.85) == pytest.approx(3.3176, abs=1e-4)
    assert entropy_bits(8, 12.85) - entropy_bits(6, 12.85) == pytest.approx(math.log2(127 / 31))
    assert entropy_bits(6, 0.5) == 6.0
    assert entropy_bits(2, 100.0) == 0.0
    with pytest.raises(ValueError, match="clip is 0"):
        entropy_bits(6, 0.0)


def test_bits_by_role_follow_the_section() -> None:
    bits = bits_by_role(CompressSection(clip=12.85, bits={"embedding": 16}))
    assert bits["embedding"] == 16.0
    assert bits["matrix"] == entropy_bits(6, 12.85)
    # A row of 512 normal numbers has a largest magnitude of about 3.2 (the median).
    widest = torch.randn(2001, 512, generator=torch.Generator().manual_seed(1)).abs().amax(1).median().item()
    assert bits_by_role(CompressSection())["matrix"] == pytest.approx(entropy_bits(6, widest), abs=0.02)


@pytest.mark.parametrize(
    ("shape", "role", "bits"),
    [
        ((10, 10), "matrix", 6),
        ((10, 10), "embedding", 8),
        ((9, 11), "matrix", 16),
        ((10, 10), "head", 16),
        ((10, 10), "decay", 16),
        ((10, 10), "vector", 16),
        ((10, 10, 10), "matrix", 16),
    ],
)
def test_what_is_quantised(shape: tuple[int, ...], role: str, bits: int) -> None:
    section = CompressSection(bits={"head": 16}, small_tensor_elements=100)
    assert stored_bits(shape, role, section) == bits


def test_bytes_equal_a_hand_count_and_the_largest_that_fits_is_chosen() -> None:
    compress = CompressSection(small_tensor_elements=500)
    bits = {"matrix": 4.0, "lowrank": 6.0, "embedding": 6.0, "head": 6.0}
    widths = [48, 32, 64]

    def by_hand(width: int) -> tuple[int, float]:
        model = CompactModel(CompactSection.model_validate({**TINY.model_dump(), "hidden_size": width}), 100)
        count, total, roles = 0, 0.0, model.roles()
        for name, parameter in model.named_parameters():
            count += parameter.numel()
            total += LEDGER_BYTES_A_TENSOR
            large = parameter.dim() == 2 and parameter.numel() >= 500
            if large and roles[name] in bits:
                total += parameter.numel() * bits[roles[name]] / 8 + 2 * len(parameter)
            else:
                total += 2 * parameter.numel()
        return count, total

    limit = 7_000 + math.ceil(by_hand(48)[1])
    rows = largest_that_fits(TINY, 100, "hidden_size", widths, limit, bits, compress, code_bytes=7_000)
    assert [row.value for row in rows] == widths
    for row in rows:
        count, total = by_hand(row.value)
        assert (row.parameters, row.bytes) == (count, 7_000 + math.ceil(total))
        assert row.margin == limit - row.bytes
    assert [(row.fits, row.chosen) for row in rows] == [(True, True), (True, False), (False, False)]


def test_patterns_and_ratios_can_be_candidates() -> None:
    rows = largest_that_fits(TINY, 100, "mlp_ratio", [2.0, 3.0], 10**9)
    assert rows[1].parameters - rows[0].parameters == 3 * 2 * 32 * 32
    layers = largest_that_fits(TINY, 100, "pattern", ["TWF", "TWFT"], 1)
    assert layers[1].parameters > layers[0].parameters
    assert not any(row.fits or row.chosen for row in layers)


def test_bad_questions_are_named() -> None:
    with pytest.raises(ValueError, match=r"field is 'depth'.*hidden_size"):
        largest_that_fits(TINY, 100, "depth", [1], 1000)
    with pytest.raises(ValueError, match="candidates is empty"):
        largest_that_fits(TINY, 100, "hidden_size", [], 1000)
    with pytest.raises(ValueError, match="hidden_size"):
        largest_that_fits(TINY, 100, "hidden_size", [0], 1000)
