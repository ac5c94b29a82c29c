"""The kernel of one token against the float64 recurrence, in Triton's interpreter."""

import pytest
import torch

from interpreted import MARKS
from trihybrid.ops.wkv7 import wkv7
from trihybrid.testing.compare import relative_error
from trihybrid.testing.wkv7_cases import make_inputs


class TestStepInterpreted:
    """One token, in float32: nothing is rounded inside."""

    pytestmark = MARKS

    @pytest.fixture
    def room(self, load):
        return load("trihybrid.ops.wkv7.decode")

    @pytest.mark.parametrize(
        ("batch", "heads", "keys", "values"),
        [(1, 2, 128, 128), (3, 2, 16, 64), (2, 1, 5, 200), (1, 1, 1, 1)],
    )
    @pytest.mark.parametrize("resets", [True, False])
    @pytest.mark.parametrize("few", [0, 1000])
    def test_is_the_recurrence(self, room, monkeypatch, batch, heads, keys, values, resets, few):
        monkeypatch.setattr("trihybrid.ops.wkv7.decode.triton.FEW_HEADS", few)
        tokens = [torch.randn(batch, 1, heads, keys) for _ in range(6)]
        tokens[3] = torch.randn(batch, 1, heads, values)
        tokens[1] = -tokens[1].abs()
        state = torch.randn(batch, heads, keys, values)
        reset = None
        if resets:
            reset = torch.arange(batch)[:, None] % 2 == 0
            # Nothing of what a document's first token replaces is read.
            tokens[1][reset] = float("nan")
            state[reset[:, 0]] = float("inf")
        expected = wkv7(*(x.double() for x in tokens), state.double(), reset, "reference")
        before = state.clone()
        o, after = room.wkv7_step(*tokens, state, reset)
        assert torch.equal(state, before)
        assert relative_error(o, expected[0]) <= 1e-6
        assert relative_error(after, expected[1]) <= 1e-6
        assert torch.equal(room.wkv7_step_(*tokens, state, reset), o)
        assert torch.equal(state, after)

    def test_strides_and_a_state_inside_a_store(self, room):
        wide = [torch.randn(2, 3, 4, 16) for _ in range(6)]
        wide[1] = -wide[1].abs()
        tokens = [x[:, 1:2, 1:3] for x in wide]
        tokens[0] = tokens[0].transpose(2, 3).contiguous().transpose(2, 3)
        store = torch.randn(2, 3, 4, 16, 16)
        kept, state = store.clone(), store[:, 2, 1:3]
        o, after = room.wkv7_step(*(x.contiguous() for x in tokens), state.contiguous())
        assert torch.equal(room.wkv7_step_(*tokens, state), o)
        kept[:, 2, 1:3] = after
        assert torch.equal(store, kept)

    def test_dtypes(self, room):
        tokens = [x[:, :1] for x in make_inputs("random", (2, 1, 2, 16))[:6]]
        tokens = [x.half() if at in (0, 3) else x for at, x in enumerate(tokens)]
        state = torch.randn(2, 2, 16, 16)
        o, after = room.wkv7_step(*tokens, state)
        expected = wkv7(*(x.double() for x in tokens), state.double(), None, "reference")
        assert o.dtype == torch.float16 and after.dtype == torch.float32
        assert relative_error(o, expected[0]) <= 1e-3
        assert relative_error(after, expected[1]) <= 1e-6

    def test_operators_keep_their_promises(self, room):
        tokens = [x[:, :1] for x in make_inputs("random", (1, 1, 1, 4))[:6]]
        arguments = (*tokens, torch.randn(1, 1, 4, 4), None)
        torch.library.opcheck(room._step, arguments)
        torch.library.opcheck(room._step_in_place, arguments)
