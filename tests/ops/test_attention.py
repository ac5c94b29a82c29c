"""Grouped attention against an explicit softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.ops.attention import attention
from trihybrid.ops.block_attention import block_attention
from trihybrid.testing import relative_error


def by_hand(q_BTHD, k_BGSD, v_BGSD, visible_BTS, scale):
    """Head by head: softmax over the visible keys, zero where there is none."""
    batch, length, heads, _ = q_BTHD.shape
    repeats = heads // k_BGSD.shape[1]
    out = torch.zeros_like(q_BTHD)
    for b in range(batch):
        for t in range(length):
            seen = visible_BTS[b, t].nonzero().flatten()
            for h in range(heads if len(seen) else 0):
                scores = k_BGSD[b, h // repeats, seen] @ q_BTHD[b, t, h] * scale
                out[b, t, h] = torch.exp(scores - scores.logsumexp(0)) @ v_BGSD[b, h // repeats, seen]
    return out


def tensors(batch, length, keys, heads, groups, width=5):
    q_BTHD = torch.randn(batch, length, heads, width, dtype=torch.float64)
    k_BGSD, v_BGSD = (torch.randn(batch, groups, keys, width, dtype=torch.float64) for _ in range(2))
    return [x.requires_grad_() for x in (q_BTHD, k_BGSD, v_BGSD)]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_masked_attention_and_its_gradients(batch, length, keys, groups, repeats, one_mask, seed):
    torch.manual_seed(seed)
    inputs = tensors(batch, length, keys, groups * repeats, groups)
    # About half of the pairs, so that whole rows are often invisible.
    visible_BTS = torch.rand(1 if one_mask else batch, length, keys) < 0.5
    out = attention(*inputs, visible_BTS, 0.37)
    expected = by_hand(*inputs, visible_BTS.expand(batch, -1, -1), 0.37)
    assert relative_error(out, expected) < 1e-12
    weights = torch.randn(out.shape, dtype=torch.float64)
    if expected.requires_grad and visible_BTS.any():
        got = torch.autograd.grad((out * weights).sum(), inputs)
        want = torch.autograd.grad((expected * weights).sum(), inputs, materialize_grads=True)
        assert relative_error(*(torch.cat([g.flatten() for g in side]) for side in (got, want))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing_is_zero_and_poisons_no_gradient(dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors(2, 4, 4, 4, 2)]
    visible_BTS = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    visible_BTS[0, :2] = False
    out = attention(*inputs, visible_BTS, 1.0)
    assert bool((out[0, :2] == 0).all())
    gradients = torch.autograd.grad(out.float().square().sum(), inputs)
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert bool((gradients[0][0, :2] == 0).all())


def test_no_mask_means_causal_or_one_query_over_all_keys():
    causal = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    inputs = tensors(2, 6, 6, 4, 2)
    assert relative_error(attention(*inputs, None, 0.5), attention(*inputs, causal, 0.5)) < 1e-12
    inputs = tensors(2, 1, 6, 4, 2)
    everything = torch.ones(1, 1, 6, dtype=torch.bool)
    assert relative_error(attention(*inputs, None, 0.5), attention(*inputs, everything, 0.5)) < 1e-12


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attention(*tensors(1, 2, 2, 3, 2), None, 1.0)


def seen_by_hand(positions_BT, window):
    """bool [B, T, T]: the tokens of the same document up to the query, the last `window` of them."""
    batch, length = positions_BT.shape
    seen = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        begin = 0
        for t in range(length):
            begin = t if positions_BT[b, t] == 0 else begin
            seen[b, t, max(begin, t + 1 - (window or length)) : t + 1] = True
    return seen


def restarting(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.none() | st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_a_block_over_itself(lengths, window, groups, repeats, seed):
    torch.manual_seed(seed)
    length = sum(lengths)
    positions_BT = torch.stack([restarting(lengths), restarting(lengths[::-1])])
    q_BTHD = torch.randn(2, length, groups * repeats, 5, dtype=torch.float64)
    k_BTGD, v_BTGD = torch.randn(2, 2, length, groups, 5, dtype=torch.float64)
    keys = k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2)
    out = block_attention(q_BTHD, k_BTGD, v_BTGD, positions_BT, len(lengths) > 1, window, 0.4)
    expected = by_hand(q_BTHD, *keys, seen_by_hand(positions_BT, window), 0.4)
    assert relative_error(out, expected) < 1e-12
    # Declared borders that are not there cost time and change nothing.
    again = block_attention(q_BTHD, k_BTGD, v_BTGD, positions_BT, True, window, 0.4)
    assert relative_error(again, expected) < 1e-12
