"""States: what they hold, what they drop, how many bytes they take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.mixers.state import KeyValueState, RecurrentState, state_bytes


def key_values(keep, dtype=torch.float32):
    return KeyValueState(torch.zeros(2, 3, 0, 4, dtype=dtype), torch.zeros(2, 3, 0, 4, dtype=dtype), keep)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.none() | st.integers(0, 9), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_append_returns_all_that_may_be_seen_and_keeps_the_last(keep, sizes):
    state = key_values(keep)
    tokens = torch.randn(2, 3, sum(sizes), 4)
    start = 0
    for size in sizes:
        new = tokens[:, :, start : start + size]
        stored = state.length
        keys, values, state = state.append(new, -new)
        start += size
        assert torch.equal(keys, tokens[:, :, start - size - stored : start])
        assert torch.equal(values, -keys)
        kept = start if keep is None else min(keep, start)
        assert torch.equal(state.keys_BGSD, tokens[:, :, start - kept : start])
        assert state.length == kept and state.keep == keep


def test_append_leaves_the_state_that_goes_in_alone():
    _, _, one = key_values(4).append(torch.ones(2, 3, 2, 4), torch.ones(2, 3, 2, 4))
    one.append(torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 4))
    assert one.length == 2 and bool((one.keys_BGSD == 1).all())


@pytest.mark.parametrize("keep", [None, 0, 5])
def test_restore_is_the_inverse_of_tensors(keep):
    _, _, state = key_values(keep).append(torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4))
    again = KeyValueState.restore(state.tensors())
    assert again.keep == keep
    assert torch.equal(again.keys_BGSD, state.keys_BGSD) and torch.equal(again.values_BGSD, state.values_BGSD)
    matrix = RecurrentState(torch.randn(2, 3, 4, 5))
    assert torch.equal(RecurrentState.restore(matrix.tensors()).matrix_BHKV, matrix.matrix_BHKV)


def test_bytes_count_the_stored_tokens():
    assert state_bytes(None) == 0
    assert state_bytes(RecurrentState(torch.zeros(1, 32, 128, 128))) == 2_097_152
    new = torch.zeros(2, 3, 7, 4, dtype=torch.bfloat16)
    for keep, tokens in ((None, 7), (5, 5)):
        _, _, state = key_values(keep, torch.bfloat16).append(new, new)
        assert state_bytes(state) == 2 * 2 * 2 * 3 * 4 * tokens
