"""The RWKV-7 mixer against its equations, and its start of training against published numbers."""

import math

import pytest
import torch

from trihybrid.mixers.contract import Shared, copy_into
from trihybrid.mixers.rwkv7 import Rwkv7, Rwkv7Options, write_gate
from trihybrid.mixers.rwkv7 import mixer as module
from trihybrid.mixers.span import contiguous, from_lengths, packed, padded
from trihybrid.mixers.state import KeyValueState, RecurrentState
from trihybrid.ops.rates import DECAY_FLOOR
from trihybrid.testing import randomise, relative_error

SMALL = Rwkv7Options(12, heads=4, kv_heads=2, head_dim=6, decay_rank=3, iclr_rank=4, gate_rank=5)
CARD = Rwkv7Options(1536, heads=32, kv_heads=4, head_dim=128, decay_rank=256, iclr_rank=256, gate_rank=256)


def small(donor=None, backend="reference", seed=0, dtype=torch.float64, **changes):
    options = Rwkv7Options(**{**vars(SMALL), **changes})
    return randomise(Rwkv7(options, 1, donor, backend), seed).to(dtype)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean() + 1e-6) * weight


def by_hand(mixer, x_TD):
    """One row, token by token and head by head, as the equations are published. Returns outputs and head states."""
    p = dict(mixer.named_parameters())
    width = SMALL.head_dim
    repeats = SMALL.heads // SMALL.kv_heads
    states = [torch.zeros(width, width, dtype=torch.float64) for _ in range(SMALL.heads)]
    outputs = []
    for x in x_TD:
        r, k, v = (
            p[f"{name}.weight"] @ x + p.get(f"{name}.bias", torch.zeros(()))
            for name in ("receptance", "key", "value")
        )
        u = p["w0"] + torch.tanh(x @ p["w1"]) @ p["w2"]
        decay = torch.exp(-torch.exp(-torch.log(1 + torch.exp(-u)) - 0.5))
        iclr = sigmoid(p["a0"] + (x @ p["a1"]) @ p["a2"])
        gate = sigmoid(x @ p["g1"]) @ p["g2"]
        reads = []
        for head in range(SMALL.heads):
            own = slice(head * width, (head + 1) * width)
            group = slice(head // repeats * width, (head // repeats + 1) * width)
            r_head = rms_norm(r[own], p["r_norm.weight"])
            k_head = rms_norm(k[group], p["k_norm.weight"])
            kk = k_head / (k_head.norm() + 1e-12)
            k_head = k_head * (1 - decay[own] + iclr[own])
            a, b = -kk, kk * iclr[own]
            before = states[head]
            states[head] = (
                torch.diag(decay[own]) @ before + torch.outer(b, a @ before) + torch.outer(k_head, v[group])
            )
            reads.append(states[head].T @ r_head / math.sqrt(width))
        outputs.append(p["output.weight"] @ (torch.cat(reads) * gate) + p.get("output.bias", torch.zeros(())))
    return torch.stack(outputs), torch.stack(states)


@pytest.mark.parametrize("biases", [{}, {"input_bias": True}, {"input_bias": True, "output_bias": True}])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equations_by_hand(backend, biases):
    mixer = small(backend=backend, **biases)
    names = {name for name, _ in mixer.named_parameters() if name.endswith("bias")}
    assert len(names) == 3 * ("input_bias" in biases) + ("output_bias" in biases)
    assert all(mixer.get_parameter(name).any() for name in names)
    x_BTD = torch.randn(2, 19, 12, dtype=torch.float64)
    y_BTD, state = mixer(x_BTD, contiguous(2, 19), None, Shared())
    for row in range(2):
        expected, states = by_hand(mixer, x_BTD[row])
        assert relative_error(y_BTD[row], expected) < 1e-12
        assert relative_error(state.matrix_BHKV[row], states) < 1e-12


@pytest.mark.parametrize(
    "changes", [{}, {"key_scale": "log_log_decay"}, {"bonus": True}, {"value_lora_rank": 3}]
)
def test_shared_keys_are_the_operands_of_every_head(changes):
    """The engine takes `operands`, training the form that shares them where it can."""
    mixer = small(**changes)
    assert mixer.options.shares_keys == (not changes)
    x_BTD = torch.randn(2, 9, 12, dtype=torch.float64)
    span = padded(torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9]), 9)
    o_BTC, g_BTC, state = mixer.recur(x_BTD, span, None, Shared())
    operands = mixer.operands(x_BTD, span, Shared())
    o_BTHN, matrix_BHNN = module.wkv7(*operands.tokens, None, span.reset_BT, "reference")
    assert relative_error(o_BTC, mixer.reads(o_BTHN, operands)) < 1e-12
    assert relative_error(state.matrix_BHKV, matrix_BHNN) < 1e-12
    assert torch.equal(g_BTC, operands.gate_BTC)


def test_decay_stays_in_its_range(monkeypatch):
    seen = []

    def spy(*arguments):
        seen.append(arguments[1])
        return wkv7_grouped(*arguments)

    wkv7_grouped = module.wkv7_grouped
    monkeypatch.setattr(module, "wkv7_grouped", spy)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        mixer = small(dtype=dtype)
        with torch.no_grad():
            mixer.w0.copy_(torch.linspace(-40, 40, 24))
        mixer(10 * torch.randn(1, 7, 12, dtype=dtype), contiguous(1, 7), None, Shared())
        log_w = seen.pop().detach()
        assert log_w.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(log_w.max()) <= 0 and float(log_w.min()) >= DECAY_FLOOR - 1e-7
        assert float(log_w.min()) < -0.6065 and float(log_w.max()) > -1e-9
    assert math.exp(DECAY_FLOOR) == pytest.approx(0.545239, abs=1e-6)


def test_card_has_18489600_parameters():
    with torch.device("meta"):
        mixer = Rwkv7(CARD, 0)
    assert sum(p.numel() for p in mixer.parameters()) == 18_489_600
    # 32 heads of 128 x 128 in float32.
    assert mixer.cost(1).state_bytes == mixer.cost(10_000).state_bytes == 2_097_152


def test_initial_decay_and_iclr_are_the_published_numbers():
    options = Rwkv7Options(8, heads=32, kv_heads=4, head_dim=128, decay_rank=2, iclr_rank=2, gate_rank=2)
    for index in (0, 3, 6):
        mixer = Rwkv7(options, index)
        mixer.initialise(index, 7, copy_into)
        mixer.requires_grad_(False)
        assert mixer.w0[[0, -1]].tolist() == pytest.approx([-8.0, 3.0], abs=1e-5)
        assert mixer.a0[[0, -1]].tolist() == pytest.approx([-0.69, 0.31], abs=1e-6)
        p = index / 6
        for n in (1, 127, 128, 2000, 4001):
            z = ((n % 128) - 63.5) / 63.5
            zz = z * abs(z)
            www = -6 + 6 * (n / 4095) ** (1 + p**0.3)
            assert float(mixer.w0[n]) == pytest.approx(www + 0.5 + 2.5 * zz, abs=1e-5)
            assert float(mixer.a0[n]) == pytest.approx(-0.19 + 0.3 * zz + 0.4 * (n / 4095 - 0.5), abs=1e-6)


@pytest.mark.parametrize("donor", [None, 0])
@pytest.mark.parametrize("gate", ["unit", "published"])
def test_initialise_writes_every_parameter_once(donor, gate):
    mixer = Rwkv7(Rwkv7Options(**{**vars(SMALL), "gate": gate}), 1, donor)
    written = []
    mixer.initialise(
        1, 3, lambda parameter, value: (written.append(id(parameter)), copy_into(parameter, value))
    )
    assert sorted(written) == sorted(id(p) for p in mixer.parameters())
    assert all(bool(p.isfinite().all()) for p in mixer.parameters())


def test_unit_gate_is_one_and_can_learn_more_than_one_direction():
    mixer = Rwkv7(SMALL, 0)
    mixer.initialise(0, 3, copy_into)
    x_BTD = 100 * torch.randn(3, 5, 12)
    o_BTC, g_BTC, _ = mixer.recur(x_BTD, contiguous(3, 5), None, Shared())
    assert float((g_BTC.detach() - 1).abs().max()) < 1e-6
    torch.autograd.backward((o_BTC * g_BTC * torch.randn(24)).square().sum())
    # Equal rows of g2 would leave one singular value.
    singular = torch.linalg.svdvals(mixer.g1.grad.double())
    assert bool((singular > 1e-4 * singular[0]).all()) and len(singular) == SMALL.gate_rank


def test_published_gate_is_small():
    g1, g2 = torch.empty(64, 256), torch.empty(256, 4096)
    write_gate(g1, g2, "published", copy_into)
    gate = torch.sigmoid(torch.randn(10, 64) @ g1) @ g2
    # Half the sum of 256 rows of an orthogonal matrix of gain 0.1: standard deviation 0.0125.
    assert float(gate.pow(2).mean().sqrt()) == pytest.approx(0.0125, rel=0.05)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_padding_leaves_the_state_to_the_bit(backend):
    mixer = small(backend=backend, dtype=torch.float32)
    state = RecurrentState(torch.randn(2, 4, 6, 6))
    padding = padded(torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]), 4, 1)
    _, after = mixer(50 * torch.randn(2, 4, 12), padding, RecurrentState(state.matrix_BHKV.clone()), Shared())
    assert torch.equal(after.matrix_BHKV, state.matrix_BHKV)


def test_right_padding_leaves_the_state_of_the_text():
    mixer = small()
    x_BTD = torch.randn(2, 9, 12, dtype=torch.float64)
    mask = torch.ones(2, 9)
    mask[0, 5:] = 0
    _, padded_state = mixer(x_BTD, padded(mask, 9), None, Shared())
    _, state = mixer(x_BTD[:1, :5], contiguous(1, 5), None, Shared())
    assert relative_error(padded_state.matrix_BHKV[:1], state.matrix_BHKV) < 1e-12


def test_a_document_that_begins_with_a_block_forgets_the_state():
    mixer = small()
    x_BTD = torch.randn(1, 6, 12, dtype=torch.float64)
    carried = RecurrentState(torch.randn(1, 4, 6, 6, dtype=torch.float64))
    y_BTD, _ = mixer(x_BTD, packed(from_lengths([4, 2]).positions_BT, start=3), carried, Shared())
    expected, _ = mixer(x_BTD, from_lengths([4, 2]), None, Shared())
    assert relative_error(y_BTD, expected) < 1e-12


def test_reader_uses_the_keys_and_values_of_its_donor():
    """A reader equals a mixer with its donor's key, value and key norm weights."""
    donor, reader = small(seed=1), small(donor=1, seed=2)
    assert not {"key.weight", "value.weight", "k_norm.weight"} & set(dict(reader.named_parameters()))
    twin = small(seed=3)
    twin.load_state_dict({**donor.state_dict(), **reader.state_dict()})
    x_BTD, span, shared = torch.randn(2, 8, 12, dtype=torch.float64), contiguous(2, 8), Shared()
    donor(x_BTD, span, None, shared)
    assert [t.shape for t in shared.keys_values["rwkv7", 1]] == [(2, 8, 2, 6)] * 2
    y_BTD, _ = reader(x_BTD, span, None, shared)
    expected, _ = twin(x_BTD, span, None, Shared())
    assert relative_error(y_BTD, expected) < 1e-12


def test_state_stays_wide():
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64,) * 2,
    ):
        mixer = small(dtype=dtype)
        _, state = mixer(torch.randn(1, 3, 12, dtype=dtype), contiguous(1, 3), None, Shared())
        assert state.matrix_BHKV.dtype == mixer.new_state(1, "cpu", dtype).matrix_BHKV.dtype == wide


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "rwkv7.heads is 5; it must be a multiple of rwkv7.kv_heads, 2"),
        ({"kv_heads": 0}, "rwkv7.kv_heads is 0; it must be at least 1"),
        ({"head_dim": 0}, "rwkv7.head_dim is 0"),
        ({"gate_rank": -1}, "rwkv7.gate_rank is -1"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_wrong_state_and_unknown_backend_are_refused():
    x_BTD, span = torch.randn(1, 2, 12), contiguous(1, 2)
    empty = torch.zeros(1, 2, 0, 6)
    with pytest.raises(ValueError, match="RecurrentState, got KeyValueState"):
        small(dtype=torch.float32)(x_BTD, span, KeyValueState(empty, empty), Shared())
    with pytest.raises(ValueError, match="no backend 'fastest'"):
        small(dtype=torch.float32, backend="fastest")(x_BTD, span, None, Shared())


def test_biases_are_vectors_and_start_at_zero():
    mixer = Rwkv7(Rwkv7Options(**vars(SMALL) | {"input_bias": True, "output_bias": True}), 1)
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, 3.0)
    mixer.initialise(1, 4, copy_into)
    biases = {name: p for name, p in mixer.named_parameters() if name.endswith("bias")}
    assert set(biases) == {f"{name}.bias" for name in ("receptance", "key", "value", "output")}
    assert not any(bias.any() for bias in biases.values())
    assert {mixer.roles()[name] for name in biases} == {"vector"}
    reader = Rwkv7(mixer.options, 2, donor=1)
    assert {n for n, _ in reader.named_parameters() if n.endswith("bias")} == {
        "receptance.bias",
        "output.bias",
    }
