"""Each published revision of the mixer against a direct reading of its equations."""

from dataclasses import replace

import pytest
import torch

import hxa07
from trihybrid.mixers.contract import Shared, copy_into
from trihybrid.mixers.rwkv7 import REVISIONS, Rwkv7, Rwkv7Options
from trihybrid.mixers.span import contiguous, from_lengths
from trihybrid.testing import randomise, relative_error

SMALL = Rwkv7Options(12, heads=4, kv_heads=2, head_dim=6, decay_rank=3, iclr_rank=4, gate_rank=5)
RANKS = {"value_residual_rank": 4, "key_residual_rank": 3, "value_lora_rank": 5}
THETA = 30.0


def options(name, **changes):
    rope = None if REVISIONS[name].rope == "never" else THETA
    return replace(SMALL, **REVISIONS[name].fields(rope, RANKS), **changes)


def build(chosen, index, first=None, seed=0):
    return randomise(Rwkv7(chosen, index, None, "reference", first), seed).double()


def published(mixer, revision):
    """Tensors under the names of their revision."""
    tensors = {name: p.detach() for name, p in mixer.named_parameters()}
    if revision in ("hxa07b", "hxa07c"):
        tensors = {name.replace("dv", "v"): p for name, p in tensors.items()}
    return tensors


@pytest.mark.parametrize("extra", [{}, {"input_bias": True, "output_bias": True, "qk_norm": False}])
@pytest.mark.parametrize("name", REVISIONS)
def test_equations_by_hand(name, extra):
    chosen = options(name, **extra)
    first, later = build(chosen, 2, seed=1), build(chosen, 5, first=2, seed=2)
    x_BTD = torch.randn(1, 13, 12, dtype=torch.float64)
    other_BTD = torch.randn(1, 13, 12, dtype=torch.float64)
    shared, span = Shared(), contiguous(1, 13)
    sizes = hxa07.Sizes(4, 2, 6, chosen.rope_base)
    pairs = None
    for mixer, given in ((first, x_BTD), (later, other_BTD)):
        y_BTD, state = mixer(given, span, None, shared)
        y_TD, states, kept = hxa07.time_mix(name, published(mixer, name), given[0], sizes, pairs)
        pairs = pairs or kept
        assert relative_error(y_BTD[0], y_TD) < 1e-12
        assert relative_error(state.matrix_BHKV[0], states) < 1e-12


def test_every_revision_is_another_function():
    """One set of tensors under seven readings: no two agree."""
    torch.manual_seed(0)
    tensors = published(
        build(options("hxa079", value_lora_rank=5, value_lora_factor=0.2), 1, first=0), "hxa079"
    )
    x_TD = torch.randn(6, 12, dtype=torch.float64)
    outputs = {}
    for name in REVISIONS:
        chosen = options(name)
        mixer = Rwkv7(chosen, 1, None, "reference", first=0).double()
        state = mixer.state_dict()
        fitting = {
            key: tensors[key] if tensors[key].shape == value.shape else torch.randn_like(value)
            for key, value in state.items()
        }
        mixer.load_state_dict(fitting)
        shared = Shared()
        shared.keys_values["rwkv7", 0] = (torch.ones(1, 6, 2, 6).double(), torch.ones(1, 6, 2, 6).double())
        outputs[name] = mixer(x_TD[None], contiguous(1, 6), None, shared)[0].detach()
    names = list(outputs)
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            assert relative_error(outputs[left], outputs[right]) > 1e-3, (left, right)


@pytest.mark.parametrize("name", REVISIONS)
def test_a_slot_has_the_parameters_of_its_revision(name):
    later = {key for key, _ in build(options(name), 4, first=1).named_parameters()}
    first = {key for key, _ in build(options(name), 1).named_parameters()}
    expected = {
        "hxa079": {"v0", "v1", "v2", "k0", "k1", "k2", "r_k"},
        "hxa07a": set(),
        "hxa07b": {"dv1", "dv2"},
        "hxa07c": {"dv1", "dv2"},
        "hxa07d": {"v0", "v1", "v2", "k0", "k1", "k2", "r_k"},
        "hxa07e": {"v0", "v1", "v2", "dv1", "dv2"},
        "hxa07i": set(),
    }[name]
    plain = {key for key, _ in Rwkv7(SMALL, 4).named_parameters()}
    assert later - plain == expected
    # The first slot mixes nothing in.
    assert first - plain == {key for key in expected if key[0] == "d" or key == "r_k"}
    assert plain <= first and plain <= later


@pytest.mark.parametrize("name", REVISIONS)
def test_initialise_writes_every_parameter_once(name):
    mixer = Rwkv7(options(name, input_bias=True, output_bias=True), 4, first=1)
    written = []
    mixer.initialise(
        4, 7, lambda parameter, value: (written.append(id(parameter)), copy_into(parameter, value))
    )
    assert sorted(written) == sorted(id(p) for p in mixer.parameters())
    assert all(bool(p.isfinite().all()) for p in mixer.parameters())


def test_residuals_and_bonus_start_at_the_published_numbers():
    mixer = Rwkv7(options("hxa079"), 4, first=1)
    mixer.initialise(4, 7, copy_into)
    mixer.requires_grad_(False)
    assert mixer.v0[[0, -1]].tolist() == pytest.approx([0.93, 0.53])
    assert torch.equal(mixer.k0, mixer.v0)
    assert not mixer.v1.any() and not mixer.k1.any()
    assert mixer.r_k.unique().tolist() == pytest.approx([-0.04])


def test_positions_start_again_with_a_document():
    """A rotated mixer on two packed documents equals each alone, which plain positions would break."""
    mixer = build(options("hxa07a"), 1)
    x_BTD = torch.randn(1, 9, 12, dtype=torch.float64)
    y_BTD, _ = mixer(x_BTD, from_lengths([4, 5]), None, Shared())
    alone, _ = mixer(x_BTD[:, 4:], contiguous(1, 5), None, Shared())
    assert relative_error(y_BTD[:, 4:], alone) < 1e-12
    turned, _ = mixer(x_BTD[:, 4:], contiguous(1, 5, start=4), None, Shared())
    assert relative_error(turned, alone) > 1e-3


def test_recomputed_layers_read_the_same_first_values():
    """Checkpointing runs the first slot again: it is still the first, and gradients are those without."""
    chosen = options("hxa07d")
    first, later = build(chosen, 1, seed=1), build(chosen, 2, first=1, seed=2)
    gradients = []
    for recompute in (False, True):
        leaf = torch.linspace(-1, 1, 5 * 12, dtype=torch.float64).view(1, 5, 12).requires_grad_()
        shared, span = Shared(), contiguous(1, 5)
        hidden = leaf
        for mixer in (first, later):
            given = (hidden, span, None, shared)
            y, _ = (
                torch.utils.checkpoint.checkpoint(mixer, *given, use_reentrant=False)
                if recompute
                else mixer(*given)
            )
            hidden = hidden + y
        gradients.append(torch.autograd.grad(hidden.square().sum(), [leaf, first.value.weight]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_base": 1.0}, "rwkv7.rope_base is 1.0"),
        ({"rope_base": 100.0, "head_dim": 5}, "head_dim even"),
        ({"value_residual_rank": -1}, "rwkv7.value_residual_rank is -1; it must be at least 0"),
        ({"key_scale": "w"}, r'rwkv7.key_scale is "w"; choose from \[.decay., .log_log_decay.\]'),
        ({"lora_input": "x"}, 'rwkv7.lora_input is "x"'),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_donor_and_a_residual_exclude_each_other():
    with pytest.raises(ValueError, match="reads keys and values of slot 1, and value_residual_rank"):
        Rwkv7(options("hxa07e"), 3, donor=1, first=1)


def test_what_a_revision_lacks_is_said():
    with pytest.raises(ValueError, match="hxa07e has value_residual_rank, value_lora_rank, of which no rank"):
        REVISIONS["hxa07e"].fields(THETA, {})
    with pytest.raises(ValueError, match="hxa07d always turns r and k by position; rope_base is None"):
        REVISIONS["hxa07d"].fields(None, RANKS)
    with pytest.raises(ValueError, match="hxa07i never turns"):
        REVISIONS["hxa07i"].fields(THETA, RANKS)
