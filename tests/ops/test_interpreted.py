"""The Triton kernels against their definitions, in Triton's interpreter: run with make test-triton.

In float32, which the definition must then meet to rounding; the squared MLP in the half precision that its products
take. Half precision on a GPU is tested beside each definition.
"""

from collections.abc import Sequence

import pytest
import torch

from interpreted import MARKS
from trihybrid.ops.block_attention import block_attention
from trihybrid.ops.divergence import (
    dense_divergence,
    softcapped_cross_entropy,
    softcapped_divergence,
)
from trihybrid.ops.softcap import softcap
from trihybrid.testing.compare import relative_error

pytestmark = MARKS

CLOSE = 1e-5


def wide(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_close(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float = CLOSE
) -> None:
    for at, (x, reference) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(x, reference) <= tolerance, at


@pytest.mark.parametrize("window", [2, 64, 65, 192])
@pytest.mark.parametrize(("heads", "groups", "width"), [(2, 1, 16), (2, 2, 32)])
def test_window_attention(load, window, heads, groups, width):
    room = load("trihybrid.ops.window_attention")
    lengths = ((100, 28, 1, 63), (64, 128))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    leaves = [torch.randn(2, 192, count, width).requires_grad_() for count in (heads, groups, groups)]
    out = room.window_attention(*leaves, positions, window, width**-0.5)
    wider = wide(leaves)
    expected = block_attention(*wider, positions, True, window, width**-0.5)
    grad = torch.randn(out.shape)
    assert_close([out], [expected])
    assert_close(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, wider, grad.double()))


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_squared_mlp(load, slope):
    room = load("trihybrid.ops.squared_mlp")
    tokens, width, inner = 256, 64, 256
    shapes = (((tokens, width), 1.0), ((inner, width), 1 / 8), ((width, inner), 1 / 16))
    leaves = [(torch.randn(shape) * scale).half().requires_grad_() for shape, scale in shapes]
    out = room.squared_mlp(*leaves, slope)
    wider = wide(leaves)
    expected = room.squared_mlp_reference(*wider, slope)
    grad = torch.randn(out.shape).half()
    assert_close([out], [expected], 2e-3)
    assert_close(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, wider, grad.double()), 2e-3
    )


@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "pairs"),
    [(2, 41, 8, 64, 8), (1, 37, 6, 16, 3), (2, 5, 3, 128, 6), (2, 19, 4, 32, 0), (1, 1, 8, 64, 32)],
)
@pytest.mark.parametrize("gain", [True, False])
def test_normed_rotation(load, batch, length, heads, width, pairs, gain):
    room = load("trihybrid.ops.rotary")
    x = torch.randn(batch, heads, length, width).transpose(1, 2).requires_grad_()
    leaves = [x, (torch.rand(heads) + 0.5).requires_grad_()][: 1 + gain]
    frequencies = room.frequencies(2 * pairs, 1e4, 2 * pairs, None, torch.float32)
    table = room.rotary_table(torch.randint(0, 500, (batch, length)), frequencies)
    out = room.normed_rotation(x, leaves[1] if gain else None, *table, 1e-6)
    wider = wide(leaves)
    expected = room.normed_rotation_reference(
        wider[0], wider[1] if gain else None, *(t.double() for t in table), 1e-6
    )
    grad = torch.randn(out.shape)
    assert_close([out], [expected])
    assert_close(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, wider, grad.double()))


@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups", "width"), [(2, 41, 8, 4, 64), (1, 37, 6, 2, 16), (1, 3, 5, 1, 256)]
)
def test_exclude_own_value(load, batch, length, heads, groups, width):
    room = load("trihybrid.ops.exclude_value")
    o = torch.randn(batch, heads, length, width).transpose(1, 2).requires_grad_()
    v = torch.randn(batch, length, groups, width)
    v[0, 0] = 0  # shorter than the floor
    leaves = [o, v.requires_grad_()]
    out = room.exclude_own_value(*leaves)
    wider = wide(leaves)
    expected = room.exclude_own_value_reference(*wider)
    grad = torch.randn(out.shape)
    assert_close([out], [expected])
    found = torch.autograd.grad(out, leaves, grad)
    exact = torch.autograd.grad(expected, wider, grad.double())
    # The gradients of short values dwarf the others.
    assert_close([found[0], *(found[1].flatten(0, 1)[1:])], [exact[0], *(exact[1].flatten(0, 1)[1:])])
    assert found[1][0, 0].norm() == exact[1][0, 0].norm() == 0


@pytest.mark.parametrize(("length", "width"), [(40, 64), (9, 512)])
def test_a_gated_branch(load, length, width):
    room = load("trihybrid.ops.mixed_norm")
    leaves = [torch.randn(2, length, width).requires_grad_() for _ in range(3)]
    wider = wide(leaves)

    def run(norm, tensors):
        x, branch, gate = tensors
        return norm(x, branch, None, None, 0.3, 1e-6, gate)

    out, expected = run(room.mixed_norm, leaves), run(room.mixed_norm_reference, wider)
    grads = [torch.randn(x.shape) for x in out]
    assert_close(out, expected)
    assert_close(
        torch.autograd.grad(out, leaves, grads),
        torch.autograd.grad(expected, wider, [x.double() for x in grads]),
    )


@pytest.mark.parametrize(("length", "width"), [(40, 64), (9, 512)])
@pytest.mark.parametrize("branched", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("blended", [True, False])
def test_mixed_norm(load, length, width, branched, mixed, blended):
    room = load("trihybrid.ops.mixed_norm")
    positions = torch.arange(length).repeat(2, 1)
    positions[0, 5:] -= 5
    positions[0, -1] = 0
    positions[1] += 3  # continues a document
    positions[1, 4:] -= 7
    x, branch, first = (torch.randn(2, length, width).requires_grad_() for _ in range(3))
    mix, shares = torch.randn(2, width).requires_grad_(), torch.rand(2, width).requires_grad_()
    leaves = [x, *[branch] * branched, *[first, mix] * mixed, *[shares] * blended]

    def run(norm, blend, tensors):
        left = iter(tensors)
        stream = [
            next(left),
            next(left) if branched else None,
            *((next(left), next(left)) if mixed else (None, None)),
        ]
        return blend(*stream, positions, *next(left), 0.3, 1e-6) if blended else norm(*stream, 0.3, 1e-6)

    out = run(room.mixed_norm, room.mixed_blend, leaves)
    wider = wide(leaves)
    expected = run(room.mixed_norm_reference, room.mixed_blend_reference, wider)
    grads = [torch.randn(x.shape) for x in out]
    assert_close(out, expected)
    assert_close(
        torch.autograd.grad(out, leaves, grads),
        torch.autograd.grad(expected, wider, [x.double() for x in grads]),
    )


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("top_k", "block"), [(None, 4500), (5, 4500), (None, 5000)])
def test_divergence(load, cap, temperature, top_k, block):
    """Blocks of 4,500 columns: several tiles, the last of them partly empty, and a last block of one. One block of
    all columns, whose logits are kept."""
    load("trihybrid.ops.divergence.tables")
    student, teacher = (torch.randn(7, 12).requires_grad_() for _ in range(2))
    head = (torch.randn(5000, 12) / 3).requires_grad_()
    leaves, wider = [student, head], wide([student, head])
    found = softcapped_divergence(student, teacher, head, cap, temperature, chunk=4, block=block, top_k=top_k)
    exact = dense_divergence(
        wider[0], teacher.detach().double(), wider[1], cap, temperature,
        top_k=top_k, teacher_head_VD=wider[1].detach(),
    )  # fmt: skip
    means = [exact.kl_N.mean(), exact.entropy_N.mean(), exact.same_N.double().mean()]
    assert_close([found.kl, found.entropy_teacher, found.agreement], means)
    assert_close(torch.autograd.grad(found.kl, leaves), torch.autograd.grad(means[0], wider))


@pytest.mark.parametrize("cap", [None, 3.0])
def test_cross_entropy(load, cap):
    load("trihybrid.ops.divergence.tables")
    hidden, head = torch.randn(7, 12).requires_grad_(), (torch.randn(5000, 12) / 3).requires_grad_()
    targets = torch.tensor([0, 4499, -100, 4500, 4999, 3, 700])
    wider = wide([hidden, head])
    found = softcapped_cross_entropy(hidden, head, targets, cap, chunk=4, block=4500)
    exact = torch.nn.functional.cross_entropy(softcap(wider[0] @ wider[1].T, cap), targets)
    assert_close([found], [exact])
    assert_close(torch.autograd.grad(found, [hidden, head]), torch.autograd.grad(exact, wider))


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1500)])
def test_gated_gelu(load, shape):
    """Far from zero too, where the exponential overflows."""
    module = load("trihybrid.ops.gated_gelu")
    gate, up = (torch.randn(shape).mul_(4).requires_grad_() for _ in range(2))
    with torch.no_grad():
        gate.view(-1)[:4] = torch.tensor([-60.0, 60.0, 0.0, -9.0])
    grad = torch.randn(shape)
    wider = wide([gate, up])
    expected = module.gated_gelu_reference(*wider)
    found = module.gated_gelu(gate, up)
    assert_close([found], [expected])
    assert_close(
        torch.autograd.grad(found, [gate, up], grad), torch.autograd.grad(expected, wider, grad.double())
    )


@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 2000), (2, 1024)])
def test_gated_gelu_of_parts_of_rows(load, shape):
    """Both halves of one product, as inference has them, and an operand that is contiguous."""
    module = load("trihybrid.ops.gated_gelu")
    gate, up = torch.randn(*shape[:-1], 2 * shape[-1]).chunk(2, -1)
    expected = module.gated_gelu_reference(gate, up)
    found = [module.gated_gelu(gate, up), module.gated_gelu(gate, up.contiguous())]
    assert_close(found, [expected] * 2)
    # Channels that lie apart, one row for all, and nothing at all.
    turned = gate.mT.contiguous().mT
    assert_close(
        [module.gated_gelu(turned, up), module.gated_gelu(gate[..., ::2], up[..., ::2])],
        [expected, expected[..., ::2]],
    )
    first = up[:1].expand_as(up)
    assert_close([module.gated_gelu(gate, first)], [module.gated_gelu_reference(gate, first)])
    assert module.gated_gelu(gate[:0], up[:0]).shape == gate[:0].shape


@pytest.mark.parametrize("shape", [(2, 7, 48), (1, 1, 3000), (1, 33, 64)])
def test_rates(load, shape):
    """As far as the floor of the decay and both ends of the logistic function."""
    module = load("trihybrid.ops.rates")
    decay, iclr = (torch.randn(shape).mul_(4) for _ in range(2))
    decay.view(-1)[:2] = torch.tensor([-90.0, 90.0])
    offsets = [torch.randn(shape[-1]) for _ in range(2)]
    found = module.rates(decay, iclr, *offsets)
    expected = module.rates_reference(decay.double(), iclr.double(), *offsets)
    assert_close(found, expected)
    assert float(found[0].min()) >= module.DECAY_FLOOR - 1e-7
    apart = [torch.stack([offset, offset], 1)[:, 0] for offset in offsets]
    assert_close(module.rates(decay, iclr, *apart), expected)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "width"), [(1, 41, 8, 256), (1, 5, 1, 512), (3, 7, 3, 16), (2, 1, 2, 128)]
)
@pytest.mark.parametrize("within", [True, False])
def test_placed_heads(load, batch, length, heads, width, within):
    """Heads by themselves, and within the rows of a wider product."""
    module = load("trihybrid.ops.placed_heads")
    rows = torch.randn(batch, length, (heads + 2 * within) * width)
    x = rows[..., within * width :][..., : heads * width].unflatten(-1, (heads, width))
    weight, angle = torch.rand(width) + 0.5, torch.randn(batch, length, 1, width // 2)
    cosine, sine = angle.cos().repeat(1, 1, 1, 2), torch.cat([-angle.sin(), angle.sin()], -1)
    found = module.placed_heads(x, weight, 1e-6, cosine, sine)
    wider = [tensor.double() for tensor in (x, weight, cosine, sine)]
    expected = module.placed_heads_reference(wider[0], wider[1], 1e-6, *wider[2:])
    assert_close([found], [expected])
    # One table for all rows of a batch.
    found = module.placed_heads(x, weight, 1e-6, cosine[:1], sine[:1])
    expected = module.placed_heads_reference(wider[0], wider[1], 1e-6, wider[2][:1], wider[3][:1])
    assert_close([found], [expected])
