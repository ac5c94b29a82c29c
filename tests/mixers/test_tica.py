"""TICA against its equations, token by token and head by head."""

import math

import pytest
import torch

from trihybrid.mixers.contract import Shared, copy_into
from trihybrid.mixers.span import contiguous, from_lengths
from trihybrid.mixers.tica import Tica, TicaOptions
from trihybrid.testing import randomise, relative_error

SMALL = TicaOptions(12, heads=4, kv_heads=2, head_dim=6, gate_rank=5)


def small(donor=None, seed=0, dtype=torch.float64, **changes):
    return randomise(Tica(TicaOptions(**{**vars(SMALL), **changes}), 1, donor), seed).to(dtype)


def rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean() + 1e-6) * weight


@torch.no_grad()
def by_hand(mixer, x_TD):
    """One document of one row, as the equations are published."""
    p = dict(mixer.named_parameters())
    width, repeats = SMALL.head_dim, SMALL.heads // SMALL.kv_heads
    outputs = []
    for t, x in enumerate(x_TD):
        heads = []
        for head in range(SMALL.heads):
            own = slice(head * width, (head + 1) * width)
            group = slice(head // repeats * width, (head // repeats + 1) * width)
            q = rms_norm(p["q_proj.weight"][own] @ x, p["q_norm.weight"])
            seen = range(t + 1)
            keys = [rms_norm(p["k_proj.weight"][group] @ x_TD[s], p["k_norm.weight"]) for s in seen]
            weights = [math.exp(float(q @ key) / math.sqrt(width)) for key in keys]
            values = [p["v_proj.weight"][group] @ x_TD[s] for s in seen]
            heads.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
        gate = 1 / (1 + torch.exp(-(x @ p["g1"]))) @ p["g2"]
        outputs.append(p["o_proj.weight"] @ (torch.cat(heads) * gate))
    return torch.stack(outputs)


def test_equations_by_hand():
    mixer = small()
    x_BTD = torch.randn(2, 9, 12, dtype=torch.float64)
    y_BTD, state = mixer(x_BTD, contiguous(2, 9), None, Shared())
    for row in range(2):
        assert relative_error(y_BTD[row], by_hand(mixer, x_BTD[row])) < 1e-12
    assert state.keys_BGSD.shape == state.values_BGSD.shape == (2, 2, 9, 6)
    packed_BTD, _ = mixer(x_BTD[:1], from_lengths([4, 5]), None, Shared())
    expected = torch.cat([by_hand(mixer, x_BTD[0, :4]), by_hand(mixer, x_BTD[0, 4:])])
    assert relative_error(packed_BTD[0], expected) < 1e-12


def test_position_does_not_matter():
    """No positional encoding: the last output does not depend on the order of the tokens before it."""
    mixer = small()
    x_BTD = torch.randn(1, 7, 12, dtype=torch.float64)
    shuffled = torch.cat([x_BTD[:, :6].flip(1), x_BTD[:, 6:]], 1)
    y_BTD, _ = mixer(x_BTD, contiguous(1, 7), None, Shared())
    again, _ = mixer(shuffled, contiguous(1, 7), None, Shared())
    assert relative_error(again[:, 6], y_BTD[:, 6]) < 1e-12


@pytest.mark.parametrize("donor", [None, 0])
def test_starts_at_zero_and_its_output_projection_gets_a_gradient(donor):
    mixer = Tica(SMALL, 1, donor)
    written = []
    mixer.initialise(
        1, 3, lambda parameter, value: (written.append(id(parameter)), copy_into(parameter, value))
    )
    assert sorted(written) == sorted(id(p) for p in mixer.parameters())
    shared = Shared({("tica", 0): (torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6))})
    y_BTD, _ = mixer(torch.randn(2, 5, 12), contiguous(2, 5), None, shared)
    assert bool((y_BTD == 0).all())
    (y_BTD * torch.randn(12)).sum().backward()
    assert float(mixer.o_proj.weight.grad.norm()) > 0.01


def test_card_has_2621696_parameters_and_1024_bytes_a_token():
    with torch.device("meta"):
        mixer = Tica(TicaOptions(1536), 0)
        reader = Tica(TicaOptions(1536), 1, donor=0)
    assert sum(p.numel() for p in mixer.parameters()) == 2_621_696
    assert mixer.cost(1).state_bytes == 1024 and mixer.cost(1000).state_bytes == 1_024_000
    assert reader.cost(1000).state_bytes == 0 and reader.new_state(1, "meta", torch.bfloat16) is None
    # 512 channels of queries: 2 FLOPs each for a score and 2 for its value.
    assert mixer.cost(101).flops - mixer.cost(100).flops == 4 * 512


def test_reader_uses_all_keys_and_values_of_its_donor():
    """Over two blocks a reader without a state equals a mixer with its donor's key, value and key norm weights."""
    donor, reader, twin = small(seed=1), small(donor=1, seed=2), small(seed=3)
    twin.load_state_dict({**donor.state_dict(), **reader.state_dict()})
    x_BTD = torch.randn(2, 8, 12, dtype=torch.float64)
    expected, _ = twin(x_BTD, contiguous(2, 8), None, Shared())
    state, outputs = None, []
    for start, end in ((0, 5), (5, 8)):
        shared, span = Shared(), contiguous(2, end - start, start)
        _, state = donor(x_BTD[:, start:end], span, state, shared)
        y_BTD, none = reader(x_BTD[:, start:end], span, None, shared)
        assert none is None
        outputs.append(y_BTD)
    assert relative_error(torch.cat(outputs, 1), expected) < 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "tica.heads is 3; it must be a multiple of tica.kv_heads, 2"),
        ({"kv_heads": 0}, "tica.kv_heads is 0; it must be at least 1"),
        ({"gate_rank": 0}, "tica.gate_rank is 0"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
