"""The kernels of WKV-7 against the float64 recurrence: small shapes in Triton's interpreter, a wide sweep on a GPU."""

from collections.abc import Sequence

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from interpreted import MARKS
from trihybrid.ops.wkv7 import wkv7
from trihybrid.ops.wkv7.grouped import wkv7_grouped
from trihybrid.testing.compare import relative_error
from trihybrid.testing.wkv7_cases import (
    KINDS,
    SHARP,
    answer,
    differentiate,
    errors,
    make_inputs,
    make_weights,
)

# Relative rms errors that half precision inside the kernels may cost. The gradient of the decay is a difference of
# larger terms; a token that is erased again and again makes the others so.
TOLERANCE, DECAY, SHARP_TOLERANCE, SHARP_GRADIENT = 5e-3, 1e-2, 2e-2, 4e-2


def tolerance(kind: str, name: str) -> float:
    if kind in SHARP:
        return SHARP_TOLERANCE if name in ("o", "final") else SHARP_GRADIENT
    return DECAY if name == "log_w" else TOLERANCE


def borders(batch: int, time: int, starts: Sequence[int], device: str = "cpu") -> torch.Tensor:
    """Resets at `starts` in the first row, and one token later in the others."""
    reset = torch.zeros(batch, time, dtype=torch.bool, device=device)
    for start in starts:
        reset[0, start] = True
        reset[1:, min(start + 1, time - 1)] = True
    return reset


def run(operator, inputs, reset, weights):
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    o, final = operator(*leaves, reset)
    assert o.dtype == inputs[3].dtype and final.dtype == torch.float32
    found = differentiate(o, final, leaves, weights)
    for x, gradient in zip(leaves, found[2:], strict=True):
        assert x is None or gradient.dtype == x.dtype
    return found


def check(operator, kind, inputs, reset, expected=None, weights=None) -> None:
    """Every output and gradient, finite and near enough to the exact ones."""
    weights = make_weights(tuple(inputs[3].shape), inputs[3]) if weights is None else weights
    expected = answer(inputs, reset, weights) if expected is None else expected
    for name, error in errors(run(operator, inputs, reset, weights), expected, inputs[0]).items():
        assert error <= tolerance(kind, name), f"{name}: {error:.2e}"


class TestInterpreted:
    """In float32, small: chunks of 16 and 32 tokens have their borders in here."""

    pytestmark = MARKS

    @pytest.fixture
    def operator(self, load):
        return load("trihybrid.ops.wkv7.triton").wkv7_triton

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("time", [1, 17, 40])
    def test_kinds(self, operator, kind, time):
        inputs = make_inputs(kind, (1, time, 2, 16))
        check(operator, kind, inputs, None)

    @pytest.mark.parametrize("time", [2, 15, 16, 31, 32, 33, 70])
    def test_lengths_without_a_state(self, operator, time):
        *tokens, _ = make_inputs("random", (2, time, 1, 16))
        check(operator, "random", [*tokens, None], None)

    @pytest.mark.parametrize("width", [32, 64])
    def test_widths(self, operator, width):
        check(operator, "random", make_inputs("random", (1, 35, 1, width)), None)

    @pytest.mark.parametrize("many", [0, 1000])
    def test_a_state_in_parts(self, operator, monkeypatch, many):
        """As it is held at a width of 128, for few heads and for many."""
        for name, value in {"PART": 16, "NARROW": 16, "WIDE": 32, "MANY": many}.items():
            monkeypatch.setattr(f"trihybrid.ops.wkv7.triton.state.{name}", value)
        check(operator, "random", make_inputs("random", (1, 35, 1, 32)), None)

    @pytest.mark.parametrize("starts", [[0], [16, 32], [5, 6, 17, 31, 39], range(40)])
    def test_documents(self, operator, starts):
        inputs, reset = make_inputs("random", (2, 40, 2, 16)), borders(2, 40, list(starts))
        # What a reset hides is never looked at.
        inputs[1][reset] = -60.0
        check(operator, "random", inputs, reset)

    def test_a_document_is_as_if_alone(self, operator):
        *tokens, state = make_inputs("slow_decay", (1, 50, 2, 16))
        o, final = operator(*tokens, state, borders(1, 50, [21]))
        first, _ = operator(*(x[:, :21] for x in tokens), state, None)
        second, alone = operator(*(x[:, 21:] for x in tokens), None, None)
        assert relative_error(o, torch.cat((first, second), 1)) <= 2 * TOLERANCE
        assert relative_error(final, alone) <= 2 * TOLERANCE

    def test_a_state_carries_on(self, operator):
        *tokens, state = make_inputs("slow_decay", (1, 50, 2, 16))
        o, final = operator(*tokens, state, None)
        first, middle = operator(*(x[:, :19] for x in tokens), state, None)
        second, last = operator(*(x[:, 19:] for x in tokens), middle, None)
        assert relative_error(o, torch.cat((first, second), 1)) <= 2 * TOLERANCE
        assert relative_error(final, last) <= 2 * TOLERANCE

    def test_strides_change_nothing_and_nothing_beyond_is_read(self, operator):
        inputs = make_inputs("random", (2, 21, 2, 16))
        strided = []
        for x in inputs[:6]:
            # Heads before tokens, more of both, and NaN wherever nobody should look.
            store = torch.full((2, 4, 40, 16), float("nan"))
            view = store.transpose(1, 2)[:, 3:24, 1:3]
            view.copy_(x)
            strided.append(view)
        weights = make_weights((2, 21, 2, 16), inputs[3])
        for x, y in zip(
            run(operator, inputs, None, weights),
            run(operator, [*strided, inputs[6]], None, weights),
            strict=True,
        ):
            assert torch.equal(x, y)

    @pytest.mark.parametrize("keep", [True, False])
    def test_the_operator_keeps_its_promises(self, load, keep):
        """What a compiler sees; calls go past it otherwise."""
        room = load("trihybrid.ops.wkv7.triton")
        inputs = [x.requires_grad_(keep) for x in make_inputs("random", (1, 17, 1, 16))]
        torch.library.opcheck(room._forward, (*inputs, None, 16, keep, False))

    def test_the_operator_is_what_an_eager_call_runs(self, load, operator):
        room = load("trihybrid.ops.wkv7.triton")
        inputs, weights = make_inputs("random", (1, 17, 2, 16)), make_weights((1, 17, 2, 16), torch.zeros(()))

        def dispatched(*arguments):
            return room._forward(*arguments, 16, True, False)[:2]

        for x, y in zip(
            run(operator, inputs, None, weights), run(dispatched, inputs, None, weights), strict=True
        ):
            assert torch.equal(x, y)

    def test_dtypes_may_differ(self, operator):
        inputs = make_inputs("random", (1, 20, 2, 16))
        for at in (0, 2, 3):
            inputs[at] = inputs[at].half()
        check(operator, "random", inputs, None)


def make_grouped(kind, shape, groups, seed=0, device="cpu", dtype=torch.float32):
    """r, log_w, k, v, kk, iclr and a state for `groups` of heads, of a kind of `make_inputs`."""
    r, log_w, k, v, a, b, state = make_inputs(kind, shape, seed, device, dtype)
    iclr = (b.float() * -a.float()).sum(-1, keepdim=True)
    scatter = torch.rand(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    k, v, kk = (x[:, :, :groups] for x in (k, v, -a))
    return [r, log_w, k, v, kk, (iclr * (0.5 + scatter)).to(dtype), state]


def check_grouped(operator, kind, inputs, reset) -> None:
    """As `check`, against the definition."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    weights = make_weights((*inputs[0].shape[:3], inputs[3].shape[-1]), inputs[3])
    o, final = wkv7_grouped(*leaves, reset, "reference")
    check(operator, kind, inputs, reset, differentiate(o, final, leaves, weights), weights)


class TestGroupedInterpreted:
    """Heads that share keys and values, in float32."""

    pytestmark = MARKS

    @pytest.fixture
    def operator(self, load):
        return load("trihybrid.ops.wkv7.triton").wkv7_triton_grouped

    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds(self, operator, kind):
        check_grouped(operator, kind, make_grouped(kind, (1, 21, 4, 16), 2), None)

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("stateful", [True, False])
    def test_groups(self, operator, groups, stateful):
        inputs = make_grouped("random", (2, 20, 2, 16), groups)
        check_grouped(operator, "random", inputs if stateful else [*inputs[:6], None], None)

    def test_a_second_group_of_tokens(self, operator):
        check_grouped(operator, "random", make_grouped("random", (1, 70, 2, 16), 1), None)

    def test_documents(self, operator):
        inputs, reset = make_grouped("random", (2, 40, 2, 16), 1), borders(2, 40, [0, 5, 6, 16, 33])
        # The recurrence does not decay there, but keys are still scaled by it.
        inputs[1][reset] = -0.9
        check_grouped(operator, "random", inputs, reset)

    def test_dtypes_may_differ(self, operator):
        inputs = make_grouped("random", (1, 20, 2, 16), 1)
        for at in (0, 2, 3):
            inputs[at] = inputs[at].half()
        check_grouped(operator, "random", inputs, None)


class TestGpu:
    """bfloat16, all kinds, around the borders of chunks and beyond them."""

    pytestmark = pytest.mark.gpu

    @pytest.fixture
    def operator(self):
        from trihybrid.ops.wkv7.triton import wkv7_triton

        return wkv7_triton

    @pytest.mark.parametrize("width", [64, 128])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("stateful", [True, False])
    def test_lengths_around_borders(self, operator, kind, width, stateful):
        near = {1, 2, 3} | {m + d for m in (16, 32, 64, 128, 256) for d in (-1, 0, 1)} | {100, 300}
        for time in sorted(near):
            inputs = make_inputs(kind, (1, time, 2, width), time, "cuda", torch.bfloat16)
            check(operator, kind, inputs if stateful else [*inputs[:6], None], None)

    @pytest.mark.parametrize("time", range(1, 301, 13))
    def test_every_length(self, operator, time):
        for length in range(time, time + 13):
            inputs = make_inputs("random", (1, length, 2, 64), length, "cuda", torch.bfloat16)
            reset = torch.rand(1, length, device="cuda") < 0.05
            check(operator, "random", inputs, reset)

    @pytest.mark.parametrize("width", [64, 128])
    @pytest.mark.parametrize("kind", KINDS)
    def test_long(self, operator, kind, width):
        inputs = make_inputs(kind, (2, 2048, 4, width), 0, "cuda", torch.bfloat16)
        check(operator, kind, inputs, None)

    @pytest.mark.parametrize("width", [64, 128])
    @pytest.mark.parametrize("kind", KINDS)
    def test_documents(self, operator, kind, width):
        inputs = make_inputs(kind, (3, 700, 2, width), 0, "cuda", torch.bfloat16)
        reset = borders(3, 700, [0, 1, 15, 16, 17, 63, 64, 65, 66, 128, 300, 699], "cuda")
        inputs[1][reset] = -60.0
        check(operator, kind, inputs, reset)

    @pytest.mark.parametrize("kind", KINDS)
    def test_shared_keys(self, kind):
        from trihybrid.ops.wkv7.triton import wkv7_triton_grouped

        inputs = make_grouped(kind, (2, 333, 8, 128), 2, 0, "cuda", torch.bfloat16)
        check_grouped(wkv7_triton_grouped, kind, inputs, borders(2, 333, [0, 1, 64, 300], "cuda"))

    @pytest.mark.parametrize("kind", ["random", "slow_decay", "repeated_keys", "constant_runs"])
    def test_as_long_as_it_gets(self, operator, kind):
        inputs = make_inputs(kind, (1, 131_072, 2, 128), 0, "cuda", torch.bfloat16)
        check(operator, kind, inputs, None)

    def test_the_chunked_form_that_answers_there_is_exact(self):
        inputs = make_inputs("repeated_keys", (1, 2048, 2, 128), 0, "cuda", torch.bfloat16)
        weights = make_weights((1, 2048, 2, 128), inputs[3])
        leaves = [x.double().requires_grad_() for x in inputs]
        found = differentiate(*wkv7(*leaves, backend="chunked"), leaves, weights)
        assert max(errors(found, answer(inputs, None, weights), inputs[0]).values()) <= 1e-10

    def test_offsets_beyond_two_to_the_31(self, operator):
        """More elements than 32 bits count: the last head's last tokens are those of a run of their own."""
        *tokens, _ = make_inputs("slow_decay", (1, 1024, 1, 128), 0, "cuda", torch.bfloat16)
        shape = (1, 540_672, 32, 128)  # 2^31 elements and 3 percent
        stores = [torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in tokens]
        for store, x in zip(stores, tokens, strict=True):
            store[:, -1024:, -1:] = x
        with torch.no_grad():
            o, final = operator(*stores, None, None)
            alone, final_alone = operator(*tokens, None, None)
        assert relative_error(o[:, -1024:, -1:], alone) <= 2 * TOLERANCE
        assert relative_error(final[:, -1:], final_alone) <= 2 * TOLERANCE
        assert not o[:, :-1024].any() and not final[:, :-1].any()

    def test_strides_change_nothing(self, operator):
        inputs = make_inputs("random", (2, 333, 3, 128), 0, "cuda", torch.bfloat16)
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:6]]
        weights = make_weights((2, 333, 3, 128), inputs[3])
        for x, y in zip(
            run(operator, inputs, None, weights),
            run(operator, [*strided, inputs[6]], None, weights),
            strict=True,
        ):
            assert torch.equal(x, y)

    def test_twice_is_the_same_to_the_bit(self, operator):
        inputs = make_inputs("random", (1, 500, 4, 128), 0, "cuda", torch.bfloat16)
        weights = make_weights((1, 500, 4, 128), inputs[3])
        first, second = (run(operator, inputs, None, weights) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def test_compiled_checkpointed_and_under_autocast(self, operator):
        inputs = make_inputs("random", (1, 200, 2, 64), 0, "cuda", torch.bfloat16)
        weights = make_weights((1, 200, 2, 64), inputs[3])
        expected = run(operator, inputs, None, weights)
        compiled = torch.compile(operator, fullgraph=True)

        def checkpointed(*arguments):
            return checkpoint(operator, *arguments, use_reentrant=False)

        def automatic(*arguments):
            with torch.autocast("cuda", torch.bfloat16):
                return operator(*arguments)

        for form in (compiled, checkpointed, automatic):
            found = run(form, inputs, None, weights)
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    @pytest.mark.parametrize("batch", [1, 33, 256])
    @pytest.mark.parametrize("width", [64, 128])
    def test_steps(self, batch, width):
        from trihybrid.ops.wkv7.decode import fits, wkv7_step, wkv7_step_

        for kind in KINDS:
            *tokens, state = make_inputs(kind, (batch, 1, 32, width), 0, "cuda", torch.bfloat16)
            reset = torch.rand(batch, 1, device="cuda") < 0.3
            assert fits(tokens[3], state)
            for where in (None, reset):
                expected = wkv7(*(x.double() for x in tokens), state.double(), where, "reference")
                o, after = wkv7_step(*tokens, state, where)
                assert relative_error(o, expected[0]) <= TOLERANCE
                assert relative_error(after, expected[1]) <= 1e-6
                kept = state.clone()
                assert torch.equal(wkv7_step_(*tokens, kept, where), o)
                assert torch.equal(kept, after)
