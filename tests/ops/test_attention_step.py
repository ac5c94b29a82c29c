"""A step of attention is norms, rotation, the new token's place in the store and softmax, wherever a text stands."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import trihybrid.ops.attention_step as operator
from interpreted import MARKS
from trihybrid.ops.attention_step import Heads, Store
from trihybrid.ops.decode_product import Gain
from trihybrid.testing import relative_error

SIZES = [(4, 1, 16), (4, 2, 8), (2, 2, 32)]
RING = 12  # places of a line


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(
    sizes: tuple[int, int, int], form: str, pages: int
) -> tuple[Tensor, Heads, Store, Tensor | None, Tensor]:
    """Projections of three sequences, heads, their store, a gate or None and an output inside of something wider."""
    heads, groups, width = sizes
    x_BP = draw(3, (heads + 2 * groups) * width + 9)
    values = heads * width + (0 if form == "keys-are-values" else groups * width)
    own = None if form == "shared" else heads * width
    parts = Heads(heads, groups, width, 0.4, (0, own, None if own is None else values))
    if form != "bare":
        gains = [Gain(1 + 0.2 * draw(width, seed=seed), 1e-6) for seed in (1, 2)]
        parts = replace(parts, q_gain=gains[0], k_gain=None if own is None else gains[1], v_epsilon=1e-6)
    if pages:
        keys, seen = draw(3 * pages + 4, 5, groups, width, seed=3), [0, 5 * pages - 1, 2 * pages + 1]
        table = torch.randperm(len(keys), generator=torch.Generator().manual_seed(4))[: 3 * pages].view(
            3, pages
        )
    else:
        keys, table, seen = draw(5, RING, groups, width, seed=3)[1:4], None, [0, 4 * RING + 7, RING - 1]
    store = Store(keys, draw(*keys.shape, seed=5), torch.tensor(seen), table)
    gate_BC = draw(3, heads * width + 3, seed=6)[:, 3:] if form == "gated" else None
    return x_BP, parts, store, gate_BC, torch.full((3, heads * width + 4), 9.0)[:, :-4]


def turned(positions_B: Tensor, width: int) -> tuple[Tensor, Tensor]:
    angle_BF = positions_B[:, None] * 10.0 ** -torch.arange(0, 1, 2 / width)
    return torch.cat([angle_BF.cos()] * 2, -1), torch.cat([-angle_BF.sin(), angle_BF.sin()], -1)


def definition(
    x_BP: Tensor, heads: Heads, store: Store, table: tuple[Tensor, Tensor] | None, gate_BC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence by sequence, head by head, in float64: the output and the store behind the step."""
    keys, values, width = store.keys.double().clone(), store.values.double().clone(), heads.width
    length, repeats = keys.shape[1], heads.heads // heads.groups

    def placed(x_HN: Tensor, gain: Gain | None, b: int, turns: bool = True) -> Tensor:
        if gain is not None:
            x_HN = x_HN / (x_HN.pow(2).mean(-1, keepdim=True) + gain.epsilon).sqrt()
            x_HN = x_HN if gain.weight is None else x_HN * gain.weight.double()
        if table is None or not turns:
            return x_HN
        halves = torch.cat([x_HN[:, width // 2 :], x_HN[:, : width // 2]], -1)
        return x_HN * table[0][b].double() + halves * table[1][b].double()

    outputs = []
    for b, seen in enumerate(store.positions_B.tolist()):
        page = b if store.table_BM is None else int(store.table_BM[b, seen // length])
        parts = [
            None if first is None else x_BP[b, first : first + count * width].double().view(count, width)
            for first, count in zip(heads.first, (heads.heads, heads.groups, heads.groups), strict=True)
        ]
        q_HN = placed(parts[0], heads.q_gain, b)
        if parts[1] is not None:
            no_weight = None if heads.v_epsilon is None else Gain(None, heads.v_epsilon)
            # A store holds half precision where its projections have it.
            keys[page, seen % length] = placed(parts[1], heads.k_gain, b).to(store.keys.dtype).double()
            values[page, seen % length] = (
                placed(parts[2], no_weight, b, False).to(store.values.dtype).double()
            )
        if store.table_BM is None:
            k_SGN, v_SGN = keys[b, : seen + 1], values[b, : seen + 1]
        else:
            k_SGN, v_SGN = (part[store.table_BM[b]].flatten(0, 1)[: seen + 1] for part in (keys, values))
        for h in range(heads.heads):
            p_S = (heads.scale * k_SGN[:, h // repeats] @ q_HN[h]).softmax(0)
            outputs.append(p_S @ v_SGN[:, h // repeats])
    o_BC = torch.stack(outputs).view(len(x_BP), -1)
    return o_BC if gate_BC is None else o_BC * gate_BC.double(), keys, values


def check(room, sizes, form, pages, bound=1e-5, device="cpu", dtype=torch.float32) -> None:
    x_BP, heads, store, gate_BC, o_BC = case(sizes, form, pages)
    gains = [
        None if gain is None else Gain(gain.weight.to(device, dtype), gain.epsilon)
        for gain in (heads.q_gain, heads.k_gain)
    ]
    heads = replace(heads, q_gain=gains[0], k_gain=gains[1])
    moved = None if store.table_BM is None else store.table_BM.to(device)
    keys, values = (part.to(device, dtype) for part in (store.keys, store.values))
    store = Store(keys, values, store.positions_B.to(device), moved)
    x_BP, gate_BC = x_BP.to(device, dtype), None if gate_BC is None else gate_BC.to(device, dtype)
    table = turned(store.positions_B.cpu(), heads.width) if form != "bare" else None
    table = None if table is None else tuple(part.to(device, dtype) for part in table)
    cpu = Store(keys.cpu(), values.cpu(), store.positions_B.cpu(), None if moved is None else moved.cpu())
    wanted, wanted_keys, wanted_values = definition(
        x_BP.cpu(),
        replace(heads, q_gain=on_cpu(gains[0]), k_gain=on_cpu(gains[1])),
        cpu,
        None if table is None else tuple(part.cpu() for part in table),
        None if gate_BC is None else gate_BC.cpu(),
    )
    wider = torch.full((3, o_BC.shape[1] + 4), 9.0, device=device, dtype=dtype)
    arrived = torch.zeros(24, dtype=torch.int32, device=device)
    room.attention_step(x_BP, heads, store, table, gate_BC, wider[:, :-4], arrived)
    assert relative_error(wider[:, :-4].double().cpu(), wanted) < bound
    assert relative_error(keys.double().cpu(), wanted_keys) < bound / 10
    assert relative_error(values.double().cpu(), wanted_values) < bound / 10
    assert (wider[:, -4:] == 9).all()
    assert (arrived == 0).all()


def on_cpu(gain: Gain | None) -> Gain | None:
    return None if gain is None else Gain(gain.weight.cpu(), gain.epsilon)


FORMS = ["own", "shared", "bare", "gated", "keys-are-values"]


@pytest.mark.parametrize("pages", [0, 3])
@pytest.mark.parametrize("form", FORMS)
def test_is_attention(form: str, pages: int) -> None:
    check(operator, SIZES[1], form, pages)


class TestInterpreted:
    """The kernels, in Triton's interpreter: parts joined by the last program, and by a second kernel."""

    pytestmark = MARKS

    @pytest.fixture
    def room(self, load, monkeypatch):
        load("trihybrid.ops.decode_attention")
        for name, value in (("LEAST_RING", 2), ("LEAST_PAGES", 3), ("PROGRAMS", 30)):
            monkeypatch.setattr(f"trihybrid.ops.attention_step.triton.{name}", value)
        return load("trihybrid.ops.attention_step")

    @pytest.mark.parametrize("pages", [0, 3, 12])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("sizes", SIZES)
    def test_is_attention(self, room, sizes, form, pages):
        check(room, sizes, form, pages)

    @pytest.mark.parametrize("form", ["own", "gated"])
    @pytest.mark.parametrize("pages", [0, 12])
    def test_many_parts(self, room, monkeypatch, form, pages):
        monkeypatch.setattr("trihybrid.ops.attention_step.triton.FEW_PARTS", 0)
        monkeypatch.setattr("trihybrid.ops.attention_step.triton.JOIN", (4, 4))
        check(room, SIZES[0], form, pages)


@pytest.mark.gpu
@pytest.mark.parametrize("pages", [0, 3, 1000])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [*SIZES, (8, 1, 256), (8, 1, 512), (4, 2, 128)])
def test_on_a_gpu(sizes: tuple[int, int, int], form: str, pages: int) -> None:
    check(operator, sizes, form, pages, 2e-2, "cuda", torch.bfloat16)
