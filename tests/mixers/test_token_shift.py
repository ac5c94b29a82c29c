"""The token-shift mixer against its formulas, token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trihybrid.mixers.contract import Shared, copy_into
from trihybrid.mixers.span import contiguous, from_lengths, padded
from trihybrid.mixers.token_shift import TokenShift, TokenShiftOptions
from trihybrid.testing import randomise, relative_error

WIDE, WIDTH = torch.float64, 6


def build(back: int, output_scale: bool, seed: int = 0) -> TokenShift:
    mixer = randomise(TokenShift(TokenShiftOptions(WIDTH, back, output_scale)), seed)
    assert isinstance(mixer, TokenShift)
    return mixer.double()


@torch.no_grad()
def by_hand(mixer: TokenShift, x_TD: Tensor) -> Tensor:
    """One document, channel by channel up to the matrices."""

    def logistic(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    def blend(t: int, mix_D: Tensor, taps_KD: Tensor | None) -> Tensor:
        z = []
        for d in range(WIDTH):
            weights = [1.0]
            if taps_KD is not None:
                powers = [math.exp(tap) for tap in taps_KD[:, d].tolist()]
                weights = [power / sum(powers) for power in powers]
            past = sum(w * float(x_TD[t - j, d]) for j, w in enumerate(weights, 1) if t >= j)
            share = logistic(float(mix_D[d]))
            z.append(share * float(x_TD[t, d]) + (1 - share) * past)
        return torch.tensor(z, dtype=WIDE)

    several = mixer.options.back > 1
    rows = []
    for t in range(len(x_TD)):
        r_D = mixer.receptance.weight @ blend(t, mixer.mix_r, mixer.taps_r if several else None)
        k_D = mixer.key.weight @ blend(t, mixer.mix_k, mixer.taps_k if several else None)
        k_D = torch.where(k_D > 0, k_D * k_D, 0.0)
        v_D = mixer.value.weight @ k_D
        v_D = v_D if mixer.value.scale is None else mixer.value.scale * v_D
        rows.append(v_D / (1 + torch.exp(-r_D)))
    return torch.stack(rows)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4), st.booleans(), st.integers(0, 99)
)
def test_formulas_over_packed_documents(lengths: list[int], back: int, scaled: bool, seed: int) -> None:
    torch.manual_seed(seed)
    mixer, x_TD = build(back, scaled, seed), torch.randn(sum(lengths), WIDTH, dtype=WIDE)
    y_BTD, state = mixer(x_TD[None], from_lengths(lengths), None, Shared())
    expected = torch.cat([by_hand(mixer, document_TD) for document_TD in x_TD.split(lengths)])
    assert relative_error(y_BTD[0], expected) < 1e-10
    assert state.last_BKD.shape == (1, back, WIDTH)


def test_sees_exactly_as_far_back_as_it_says() -> None:
    for back in (1, 3):
        mixer = build(back, False)
        x_BTD = torch.randn(1, 9, WIDTH, dtype=WIDE, requires_grad=True)
        y_BTD, _ = mixer(x_BTD, contiguous(1, 9), None, Shared())
        (gradient,) = torch.autograd.grad(y_BTD[:, 6].square().sum(), x_BTD)
        assert [bool(row.any()) for row in gradient[0]] == [6 - back <= t <= 6 for t in range(9)]


@pytest.mark.parametrize("back", [1, 3])
def test_left_padding_changes_no_real_token(back: int) -> None:
    mixer, x_BTD = build(back, True), torch.randn(2, 8, WIDTH, dtype=WIDE)
    mask_BT = torch.ones(2, 8, dtype=torch.bool)
    mask_BT[0, :3] = False
    y_BTD, _ = mixer(x_BTD, padded(mask_BT, 8), None, Shared())
    alone_BTD, _ = mixer(x_BTD[:1, 3:], contiguous(1, 5), None, Shared())
    assert relative_error(y_BTD[0, 3:], alone_BTD[0]) < 1e-10


def test_start() -> None:
    mixer = TokenShift(TokenShiftOptions(WIDTH, 3, True))
    mixer.initialise(0, 1, copy_into)
    eye = torch.eye(WIDTH)
    for projection in (mixer.receptance, mixer.key):
        assert torch.allclose(projection.weight @ projection.weight.mT, eye, atol=1e-5)
    assert not mixer.value.weight.any() and bool((mixer.value.scale == 1).all())
    assert mixer.mix_r.tolist() == mixer.mix_k.tolist() == [0.5] * WIDTH
    assert bool((mixer.taps_k.diff(dim=0) < 0).all())
    seed = TokenShift(TokenShiftOptions(512))
    # W_r, W_k and W_v as in a grouped attention of the same width, and two mixes.
    assert sum(p.numel() for p in seed.parameters()) == 786_432 + 2 * 512


@pytest.mark.parametrize("back", [0, -1, 65])
def test_distances_that_are_refused(back: int) -> None:
    with pytest.raises(ValueError, match=rf"token_shift\.back is {back}; it must lie in 1 to 64 tokens"):
        TokenShiftOptions(WIDTH, back)
