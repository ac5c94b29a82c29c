"""A decoding step's products are torch's operators around a matrix product, for any number of rows."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from interpreted import MARKS
from trihybrid.ops.decode_product import Before, Finish, Gain, normed_product, product, raised
from trihybrid.testing import relative_error

ROWS = [1, 2, 5]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def befores(rows: int, width: int) -> list[Before]:
    # Epsilons that differ, and that are seen.
    gains = [Gain(1 + 0.3 * draw(width, seed=seed), epsilon) for seed, epsilon in ((2, 0.1), (3, 2.0))]
    y_BD, scalar = draw(rows, width, seed=4), torch.tensor([0.7])
    return [
        Before(),
        Before(gain=gains[0]),
        Before(y_BD, None, None, gains[0]),
        Before(y_BD, gains[1], None, gains[0]),
        Before(y_BD, gains[1], scalar, Gain(None, 0.5)),
        Before(y_BD, Gain(None, 1e-6), scalar, None),
        Before(scalar=scalar, gain=gains[0]),
    ]


def finishes(rows: int, outputs: int) -> list[tuple[Finish, int]]:
    """With the rows of weights that they take."""
    other_BO = draw(rows, 3, outputs, seed=5)[:, 1]
    return [
        (Finish(), outputs),
        (Finish("gated", "gelu"), 2 * outputs),
        (Finish("gated", "silu"), 2 * outputs),
        (Finish("times", "gelu", other_BO), outputs),
        (Finish("ranks", borders=(outputs // 3, outputs // 2)), outputs),
        (Finish("logits", cap=3.0), outputs),
        (Finish("logits"), outputs),
    ]


def definition(x: Tensor, weight: Tensor, before: Before, finish: Finish) -> tuple[Tensor, Tensor]:
    """In float64, as the formulas are."""

    def norm(x: Tensor, gain: Gain) -> Tensor:
        y = x / (x.pow(2).mean(-1, keepdim=True) + gain.epsilon).sqrt()
        return y if gain.weight is None else y * gain.weight.double()

    x, weight = x.double(), weight.double()
    if before.y_BD is not None:
        y = before.y_BD.double()
        x = x + (y if before.y_gain is None else norm(y, before.y_gain))
    if before.scalar is not None:
        x = x * before.scalar.double()
    o = (x if before.gain is None else norm(x, before.gain)) @ weight.T
    act = {"gelu": lambda u: gelu(u, approximate="tanh"), "silu": silu}[finish.activation]
    if finish.kind == "gated":
        o = act(o[:, : len(weight) // 2]) * o[:, len(weight) // 2 :]
    if finish.kind == "times":
        o = act(o) * finish.other_BO.double()
    if finish.kind == "ranks":
        first, second = finish.borders
        o = torch.cat([o[:, :first], o[:, first:second].tanh(), 1 / (1 + (-o[:, second:]).exp())], -1)
    if finish.cap is not None:
        o = finish.cap * (o / finish.cap).tanh()
    return x, o


def check(rows: int, width: int, outputs: int, call=normed_product, bound: float = 1e-5, **kind) -> None:
    x_BD = draw(rows, width, seed=1).to(**kind)
    pairs = [(before, *finishes(rows, outputs)[0]) for before in befores(rows, width)]
    pairs += [(befores(rows, width)[4], finish, count) for finish, count in finishes(rows, outputs)]
    for before, finish, count in pairs:
        weight_OD = (draw(count, width, seed=6) * width**-0.5).to(**kind)
        moved = [
            Before(
                None if before.y_BD is None else before.y_BD.to(**kind),
                moved_gain(before.y_gain, **kind),
                None if before.scalar is None else before.scalar.to(**kind),
                moved_gain(before.gain, **kind),
            ),
            Finish(
                finish.kind,
                finish.activation,
                None if finish.other_BO is None else finish.other_BO.to(**kind),
                finish.borders,
                finish.cap,
            ),
        ]
        kept = x_BD.clone()
        after_BD, o_BO = call(x_BD, weight_OD, *moved)
        wanted_after, wanted = definition(x_BD, weight_OD, *moved)
        assert torch.equal(x_BD, kept)
        assert relative_error(after_BD.double(), wanted_after) < bound
        assert relative_error(o_BO.double(), wanted) < bound
        assert o_BO.dtype == (torch.float32 if finish.kind == "logits" else x_BD.dtype)


def moved_gain(gain: Gain | None, **kind) -> Gain | None:
    if gain is None or gain.weight is None:
        return gain
    return Gain(gain.weight.to(**kind), gain.epsilon)


def check_raised(call=raised, bound: float = 1e-5, **kind) -> None:
    shapes = [(3, 40), (5, 40), (2, 40), (4, 24)]
    flat = draw(sum(rank * channels for rank, channels in shapes), seed=7).to(**kind)
    weights = [
        part.view(shape) for part, shape in zip(flat.split([r * c for r, c in shapes]), shapes, strict=True)
    ]
    x_BP = draw(5, 34, seed=8).to(**kind)[:, :30]
    for count in (1, 3, 4):
        wanted, first = [], 11
        for weight in weights[:count]:
            wanted.append(x_BP[:, first : first + len(weight)].double() @ weight.double())
            first += len(weight)
        found = call(x_BP, 11, weights[:count])
        assert relative_error(found.double(), torch.cat(wanted, -1)) < bound


@pytest.mark.parametrize("rows", ROWS)
def test_products_of_the_stream(rows: int) -> None:
    check(rows, 48, 30)


def test_groups_of_ranks() -> None:
    check_raised()


class TestInterpreted:
    """The kernels, in Triton's interpreter."""

    pytestmark = MARKS

    @pytest.fixture
    def room(self, load):
        return load("trihybrid.ops.decode_product")

    @pytest.mark.parametrize("rows", [*ROWS, 8])
    @pytest.mark.parametrize(("width", "outputs"), [(48, 30), (128, 7), (520, 540)])
    def test_products_of_the_stream(self, room, rows, width, outputs):
        check(rows, width, outputs, room.normed_product)

    def test_programs_go_on_to_further_blocks(self, room):
        """More blocks than programs: with two processors, 8 programs of 4 outputs."""
        x_BD, weight_OD = draw(1, 16), draw(300, 16, seed=1)
        finish = Finish("logits", cap=2.0)
        _, o_BO = room.normed_product(x_BD, weight_OD, Before(), finish)
        assert relative_error(o_BO, definition(x_BD, weight_OD, Before(), finish)[1]) < 1e-5

    @pytest.mark.parametrize("rows", [*ROWS, 8])
    @pytest.mark.parametrize(("inputs", "outputs"), [(24, 9), (2500, 10), (1024, 3), (600, 520)])
    def test_plain_products(self, room, rows, inputs, outputs):
        x_BI, weight_OI = draw(rows, inputs + 16)[:, 16:], draw(outputs, inputs + 8, seed=1)[:, :inputs]
        assert relative_error(room.product(x_BI, weight_OI), x_BI.double() @ weight_OI.double().T) < 1e-5

    def test_groups_of_ranks(self, room):
        check_raised(room.raised)


@pytest.mark.gpu
class TestCompiled:
    """The kernels on a GPU, in bfloat16."""

    KIND = {"device": "cuda", "dtype": torch.bfloat16}

    @pytest.mark.parametrize("rows", [*ROWS, 8])
    @pytest.mark.parametrize(("width", "outputs"), [(48, 30), (1536, 2048)])
    def test_products_of_the_stream(self, rows, width, outputs):
        check(rows, width, outputs, bound=2e-2, **self.KIND)

    @pytest.mark.parametrize("rows", [*ROWS, 8])
    @pytest.mark.parametrize(("inputs", "outputs"), [(256, 1536), (6144, 1536), (4608, 1536), (40, 9)])
    def test_plain_products(self, rows, inputs, outputs):
        x_BI = draw(rows, inputs).to(**self.KIND)
        weight_OI = draw(outputs, inputs, seed=1).to(**self.KIND)
        wanted = x_BI.double() @ weight_OI.double().T
        assert relative_error(product(x_BI, weight_OI).double(), wanted) < 2e-2

    def test_groups_of_ranks(self):
        check_raised(bound=2e-2, **self.KIND)
