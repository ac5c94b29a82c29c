"""A recurrence's step between its products is the mixer's own, in place, with and without what the options add."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import trihybrid.ops.recurrence_step as operator
from interpreted import MARKS
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.rwkv7.options import Rwkv7Options
from trihybrid.ops.decode_product import Gain
from trihybrid.ops.recurrence_step import Recurrence
from trihybrid.ops.wkv7 import wkv7
from trihybrid.testing import relative_error

CASES = [
    {},
    {"qk_norm": False, "key_scale": "log_log_decay"},
    {"bonus": True, "heads": 3, "kv_heads": 3, "head_dim": 20},
]


def check(room, changes: dict, bound: float, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Against the mixer's recurrence in float64, over a store of more rows and an output with room behind it."""
    torch.manual_seed(3)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16} | changes
    options = Rwkv7Options(hidden_size=8, decay_rank=2, iclr_rank=2, gate_rank=2, **sizes)
    mixer = Rwkv7(options, 0).double()
    heads, groups, width = options.heads, options.kv_heads, options.head_dim
    batch, channels, shared = 3, options.channels, options.kv_channels
    for parameter in mixer.parameters():
        parameter.data = torch.randn_like(parameter).to(dtype).double().requires_grad_(False)
    x_BP = torch.randn(batch, channels + 2 * shared + 5).to(device, dtype)
    raised_BP = torch.randn(batch, 3 * channels + 7).to(device, dtype)
    state = torch.randn(batch + 2, heads, width, width).to(device)
    kept, before_BHNN = state.clone(), state[:batch].double().cpu()

    def gain(name: str) -> Gain | None:
        norm = getattr(mixer, name, None)
        return None if norm is None else Gain(norm.weight.to(device, dtype), norm.epsilon)

    o_BP = torch.full((batch, channels + 6), 9.0).to(device, dtype)
    recurrence = Recurrence(
        heads, groups, width, mixer.w0.to(device), mixer.a0.to(device), gain("r_norm"), gain("k_norm"),
        options.key_scale == "decay", mixer.r_k.to(device) if options.bonus else None,
    )  # fmt: skip
    room.recurrence_step(x_BP, raised_BP, recurrence, state[:batch], o_BP[:, :channels])
    wanted, after_BHNN = definition(mixer, x_BP.double().cpu(), raised_BP.double().cpu(), before_BHNN)
    assert relative_error(o_BP[:, :channels].double().cpu(), wanted) < bound
    assert relative_error(state[:batch].double().cpu(), after_BHNN) < 1e-5
    assert torch.equal(state[batch:], kept[batch:])
    assert (o_BP[:, channels:] == 9).all()


def definition(mixer: Rwkv7, x_BP: Tensor, raised_BP: Tensor, state_BHNN: Tensor) -> tuple[Tensor, Tensor]:
    """The mixer, with the raw products in the place of its projections."""
    options = mixer.options
    channels, shared = options.channels, options.kv_channels
    iclr_BC, decay_BC, gate_BC = raised_BP[:, None, : 3 * channels].chunk(3, -1)
    r, k, v = x_BP[:, None, : channels + 2 * shared].split([channels, shared, shared], -1)
    r, k, v = (x.unflatten(-1, (-1, options.head_dim)) for x in (r, k, v))
    if options.qk_norm:
        r, k = mixer.r_norm(r), mixer.k_norm(k)
    mixer._projected = lambda *given: (r, k, v, decay_BC, iclr_BC, gate_BC)  # type: ignore[method-assign]
    span = SimpleNamespace(valid_BT=None)
    operands = mixer.operands(x_BP[:, None], span, None)  # type: ignore[arg-type]
    o_BTHN, after_BHNN = wkv7(*operands.tokens, state_BHNN, None, "reference")
    return (mixer.reads(o_BTHN, operands) * gate_BC)[:, 0], after_BHNN


@pytest.mark.parametrize("changes", CASES)
def test_is_the_mixers_recurrence(changes: dict) -> None:
    check(operator, changes, 1e-5)


class TestInterpreted:
    """The kernel, in Triton's interpreter."""

    pytestmark = MARKS

    @pytest.mark.parametrize("few", [0, 1000])
    @pytest.mark.parametrize("changes", CASES)
    def test_is_the_mixers_recurrence(self, load, monkeypatch, changes, few):
        room = load("trihybrid.ops.recurrence_step")
        monkeypatch.setattr("trihybrid.ops.recurrence_step.triton.FEW_HEADS", few)
        check(room, changes, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [*CASES, {"heads": 32, "kv_heads": 4, "head_dim": 128}])
def test_on_a_gpu(changes: dict) -> None:
    check(operator, changes, 2e-2, "cuda", torch.bfloat16)
