"""One layer against its formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.mixers.attention import Attention
from trihybrid.mixers.contract import ROLES, Shared, copy_into
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.span import contiguous, from_lengths
from trihybrid.mixers.tica import Tica
from trihybrid.mixers.token_shift import TokenShift
from trihybrid.models.compact.block import Block, Mlp
from trihybrid.models.compact.section import CompactSection
from trihybrid.testing import randomise, relative_error

WIDE, WIDTH = torch.float64, 8
LEGEND = {
    "T": {"mixer": "token_shift", "back": 2},
    "W": {"mixer": "sliding", "window": 3, "value_residual": True},
    "X": {"mixer": "full", "xsa": True, "rope_dims": 2},
    "R": ["rwkv7", "tica"],
    "B": ["token_shift", "full"],
}


def section(**changes: object) -> CompactSection:
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": 4}
    ranks = {"decay_rank": 2, "iclr_rank": 2, "gate_rank": 2}
    return CompactSection.model_validate(
        {"hidden_size": WIDTH, "pattern": "TWXRB", "legend": LEGEND, "mlp_ratio": 1.5, "rope_dims": 4,
         "value_embedding_layers": [], "rwkv7": sizes | ranks, "tica": sizes | {"gate_rank": 2}}
        | sizes | changes
    )  # fmt: skip


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.integers(0, 4),
    st.sampled_from(["none", "attention", "all"]),
    st.sampled_from(["leaky_relu2", "relu2"]),
    st.booleans(),
    st.booleans(),
)
def test_formulas(index: int, norm_scale: str, activation: str, mixed: bool, scaled: bool) -> None:
    shape = section(norm_scale=norm_scale, activation=activation, embedding_mix=mixed, branch_scales=scaled)
    block = randomise(Block(shape, shape.slots()[index], index), index).double()  # type: ignore[arg-type]
    assert isinstance(block, Block)
    x_BTD, branch_BTD, first_BTD = torch.randn(3, 1, 6, WIDTH, dtype=WIDE)
    span = contiguous(1, 6)
    with torch.no_grad():
        nothing: list[None] = [None] * len(block.mixers)
        y_BTD, output_BTD, after = block(x_BTD, branch_BTD, first_BTD, span, nothing, Shared())
        u_BTD = x_BTD + branch_BTD
        if block.embedding_mix is not None:
            u_BTD = block.embedding_mix[0] * u_BTD + block.embedding_mix[1] * first_BTD
        attention = norm_scale == "attention" and index in (1, 2, 4)
        c = 1 / (index + 1) ** 0.5 if norm_scale == "all" or attention else 1.0
        z_BTD, expected, shared = c * rms(u_BTD), u_BTD, Shared()
        for mixer in block.mixers:
            expected = expected + mixer(z_BTD, span, None, shared)[0]
        h_BTI = c * rms(expected) @ block.mlp.up.weight.T
        slope = 0.5 if activation == "leaky_relu2" else 0.0
        h_BTI = torch.where(h_BTI > 0, h_BTI, slope * h_BTI) ** 2
        m_BTD = h_BTI @ block.mlp.down.weight.T
        m_BTD = m_BTD if block.mlp.down.scale is None else block.mlp.down.scale * m_BTD
    assert relative_error(y_BTD, expected) < 1e-10
    assert relative_error(output_BTD, m_BTD) < 1e-10
    assert len(after) == len(block.mixers)
    assert (block.mlp.down.scale is not None) == scaled == (f"{OUTPUTS[index]}.scale" in block.roles())


OUTPUTS = ["mixers.0.value", "mixers.0.output", "mixers.0.output", "mlp.down", "mixers.1.output"]


def test_scaled_rows_are_scaled_outputs() -> None:
    mlp = Mlp(WIDTH, 6, 0.5, True).double()
    plain = Mlp(WIDTH, 6, 0.5, False).double()
    plain.load_state_dict({n: t for n, t in mlp.state_dict().items() if n != "down.scale"})
    assert mlp.down.scale is not None
    torch.nn.init.normal_(mlp.down.scale)
    x_BTD = torch.randn(1, 5, WIDTH, dtype=WIDE)
    assert relative_error(mlp(x_BTD), mlp.down.scale * plain(x_BTD)) < 1e-12


def test_negative_inputs_keep_a_gradient_only_when_leaky() -> None:
    for slope, answer in ((0.5, [-0.5, 0.25]), (0.0, [0.0, 0.0])):
        mlp = Mlp(1, 1, slope, False)
        torch.nn.init.ones_(mlp.up.weight)
        torch.nn.init.ones_(mlp.down.weight)
        x = torch.tensor([[[-1.0]]], requires_grad=True)
        y = mlp(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert [gradient.item(), y.item()] == answer


def test_the_slots_options_reach_the_mixers() -> None:
    shape = section(value_residual=False)
    blocks = [Block(shape, slot, index) for index, slot in enumerate(shape.slots())]
    kinds = [[type(mixer) for mixer in block.mixers] for block in blocks]
    assert kinds == [[TokenShift], [Attention], [Attention], [Rwkv7, Tica], [TokenShift, Attention]]
    shift, window, whole = (block.mixers[0] for block in blocks[:3])
    assert isinstance(shift, TokenShift) and shift.options.back == 2
    assert isinstance(window, Attention) and isinstance(whole, Attention)
    assert (window.options.window, window.options.xsa, window.options.rope_dims) == (3, False, 4)
    assert (whole.options.window, whole.options.xsa, whole.options.rope_dims) == (None, True, 2)
    # The first attention has no earlier values to mix in, whatever is asked for.
    assert not window.options.value_residual and not whole.options.value_residual
    later = Block(section(value_residual=True), shape.slots()[2], 2).mixers[0]
    assert isinstance(later, Attention) and later.options.value_residual


def test_one_shift_without_a_state_is_the_mixer_on_normed_rows() -> None:
    """The blend inside the norm gives what norm and mixer give, row for row and in the state, borders included."""
    shape = section(legend=LEGEND | {"T": "token_shift"}, norm_scale="all")
    block = randomise(Block(shape, shape.slots()[0], 3), 0).double()
    assert isinstance(block, Block)
    (mixer,) = block.mixers
    assert isinstance(mixer, TokenShift)
    x_BTD, branch_BTD, first_BTD = torch.randn(3, 1, 9, WIDTH, dtype=WIDE)
    span = from_lengths([4, 1, 4])
    with torch.no_grad():
        y_BTD, _, (state,) = block(x_BTD, branch_BTD, first_BTD, span, [None], Shared())
        u_BTD = block.embedding_mix[0] * (x_BTD + branch_BTD) + block.embedding_mix[1] * first_BTD
        z_BTD = rms(u_BTD) / 2
        mixed_BTD, expected = mixer(z_BTD, span, None, Shared())
        # A state that is there already, and holds nothing, takes the other way.
        other_BTD, _, (other,) = block(
            x_BTD, branch_BTD, first_BTD, span, [mixer.new_state(1, "cpu", WIDE)], Shared()
        )
    assert relative_error(y_BTD, u_BTD + mixed_BTD) < 1e-10
    assert relative_error(other_BTD, y_BTD) < 1e-10
    assert relative_error(state.last_BKD, expected.last_BKD) < 1e-10
    assert relative_error(other.last_BKD, state.last_BKD) < 1e-10


@pytest.mark.parametrize("index", range(5))
def test_the_start_leaves_the_stream_as_it_is(index: int) -> None:
    shape = section()
    block = Block(shape, shape.slots()[index], index)
    block.initialise(index, 5, copy_into)
    x_BTD, first_BTD = torch.randn(2, 1, 4, WIDTH)
    y_BTD, output_BTD, _ = block(
        x_BTD, None, first_BTD, contiguous(1, 4), [None] * len(block.mixers), Shared()
    )
    assert torch.equal(y_BTD + output_BTD, x_BTD)


@pytest.mark.parametrize("index", range(5))
def test_roles_cover_parameters(index: int) -> None:
    shape = section()
    block = Block(shape, shape.slots()[index], index)
    roles = block.roles()
    assert set(roles) == {name for name, _ in block.named_parameters()}
    assert set(roles.values()) <= set(ROLES)
    assert roles["mlp.up.weight"] == roles["mlp.down.weight"] == "matrix"
    assert roles["mlp.down.scale"] == roles["embedding_mix"] == "vector"
