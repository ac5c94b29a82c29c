"""The embedding front end against its formulas, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trihybrid.mixers.contract import ROLES, copy_into
from trihybrid.mixers.front import Front, FrontOptions, FrontState
from trihybrid.mixers.span import contiguous, from_lengths, padded
from trihybrid.testing import relative_error

WIDE = torch.float64


def build(options: FrontOptions) -> Front:
    """A front end with random parameters, none of them silent."""
    front = Front(options).double()
    with torch.no_grad():
        for parameter in front.parameters():
            parameter.normal_()
    return front


@torch.no_grad()
def by_hand(front: Front, tokens: list[int]) -> Tensor:
    """One document, [T, D]."""
    options, rows = front.options, []
    for t, token in enumerate(tokens):
        e_D = front.tokens[token]
        if options.bigram_buckets:
            last = options.bigram_buckets - 1
            bucket = last if t == 0 else ((36313 * token) ^ (27191 * tokens[t - 1])) % last
            e_D = e_D + front.bigram_scale * (front.bigram_output.weight @ front.bigrams[bucket])
        rows.append(e_D / torch.sqrt((e_D * e_D).sum() / options.hidden_size + 1e-6))
    if not options.smear:
        return torch.stack(rows)
    smeared = []
    for t, x_D in enumerate(rows):
        gate_D = 1 / (1 + torch.exp(-front.gate_D))
        smeared.append((1 - gate_D) * x_D + (gate_D * rows[t - 1] if t else 0))
    return torch.stack(smeared)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), min_size=1, max_size=3),
    st.sampled_from([0, 2, 3, 17]),
    st.booleans(),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_formulas_over_packed_documents_in_blocks(
    documents: list[list[int]], buckets: int, smear: bool, sizes: list[int]
) -> None:
    front = build(FrontOptions(6, 41, bigram_buckets=buckets, bigram_width=4, smear=smear))
    expected = torch.cat([by_hand(front, tokens) for tokens in documents])
    tokens_BT = torch.tensor([[token for tokens in documents for token in tokens]])
    span = from_lengths([len(tokens) for tokens in documents])
    x_BTD, _ = front(tokens_BT, span, None, WIDE)
    assert relative_error(x_BTD[0], expected) < 1e-10
    state, start, parts = front.new_state(1, "cpu", WIDE), 0, []
    while start < tokens_BT.shape[1]:
        stop = start + sizes[len(parts) % len(sizes)]
        inside = from_lengths([len(tokens) for tokens in documents])
        block = type(span)(inside.positions_BT[:, start:stop], start, borders=True)
        x_BTD, state = front(tokens_BT[:, start:stop], block, state, WIDE)
        parts.append(x_BTD[0])
        start = stop
    assert relative_error(torch.cat(parts), expected) < 1e-10


def test_hash_of_a_large_vocabulary_is_the_exact_integer() -> None:
    front = build(FrontOptions(4, 300_000, bigram_buckets=1000, bigram_width=4, smear=False))
    tokens = [299_999, 262_144, 7]
    x_BTD, _ = front(torch.tensor([tokens]), contiguous(1, 3), None, WIDE)
    assert relative_error(x_BTD[0], by_hand(front, tokens)) < 1e-10


def test_left_padding_changes_no_real_token() -> None:
    front = build(FrontOptions(6, 41, bigram_buckets=17, bigram_width=4))
    tokens_BT = torch.randint(41, (2, 7))
    mask_BT = torch.ones(2, 7, dtype=torch.bool)
    mask_BT[0, :4] = False
    x_BTD, _ = front(tokens_BT, padded(mask_BT, 7), None, WIDE)
    assert relative_error(x_BTD[0, 4:], by_hand(front, tokens_BT[0, 4:].tolist())) < 1e-10


def test_state_is_one_token_and_one_row() -> None:
    front = build(FrontOptions(6, 41, bigram_buckets=17, bigram_width=4)).bfloat16()
    tokens_BT = torch.randint(41, (3, 5))
    x_BTD, state = front(tokens_BT, contiguous(3, 5), None, torch.bfloat16)
    assert x_BTD.dtype == state.row_B1D.dtype == torch.bfloat16
    assert torch.equal(state.token_B1, tokens_BT[:, -1:]) and state.token_B1.dtype == torch.int64
    assert sum(t[:1].numel() * t.element_size() for t in state.tensors().values()) == front.cost().state_bytes
    again = FrontState.restore(state.tensors())
    assert torch.equal(again.token_B1, state.token_B1) and torch.equal(again.row_B1D, state.row_B1D)


def test_start_and_roles() -> None:
    front = Front(FrontOptions(16, 5000, 64, 8, bigram_gain=22**-0.5, smear_start=-1.0, embedding_std=0.02))
    front.initialise(copy_into)
    assert front.tokens.std().item() == pytest.approx(0.02, rel=0.02)
    assert not front.bigrams.any() and front.bigram_scale.item() == pytest.approx(0.05)
    weight = front.bigram_output.weight
    assert torch.allclose(weight.mT @ weight, torch.eye(8) / 22, atol=1e-6)
    assert front.gate_D.tolist() == [-1.0] * 16
    roles = front.roles()
    assert set(roles) == {name for name, _ in front.named_parameters()} and set(roles.values()) <= set(ROLES)
    assert roles["tokens"] == roles["bigrams"] == "embedding" and roles["bigram_output.weight"] == "matrix"
    assert set(Front(FrontOptions(16, 9, bigram_buckets=0, smear=False)).roles()) == {"tokens"}


def test_a_gate_of_zero_is_half_of_each() -> None:
    front = Front(FrontOptions(8, 9, bigram_buckets=0))
    front.initialise(copy_into)
    plain = Front(FrontOptions(8, 9, bigram_buckets=0, smear=False))
    plain.tokens = front.tokens
    tokens_BT = torch.tensor([[3, 5]])
    smeared, rows = (f(tokens_BT, contiguous(1, 2), None, torch.float32)[0][0] for f in (front, plain))
    assert torch.allclose(smeared, torch.stack([rows[0] / 2, (rows[0] + rows[1]) / 2]))
    assert rows[0].square().mean().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("buckets", [1, -1])
def test_hash_tables_that_are_refused(buckets: int) -> None:
    with pytest.raises(ValueError, match=rf"front\.bigram_buckets is {buckets}; it must be 0"):
        FrontOptions(8, 9, bigram_buckets=buckets)
