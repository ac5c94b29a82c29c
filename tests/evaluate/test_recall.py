"""Recall of an oracle, of chance, and of a model that sees a window only."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trihybrid.data import RecallSet, Tokenizer, encode_probe, recall_documents
from trihybrid.evaluate import distance_edges, recall

# 26 upper-case keys of the byte tokenizer.
KEYS = range(ord("A") + 4, ord("Z") + 5)


@pytest.fixture(scope="module")
def probe() -> RecallSet:
    return encode_probe(recall_documents(12, pairs=8, rounds=3, seed=0), Tokenizer.bytes(), 128)


def lookup(span: int):
    """After a key: the token that followed its last earlier copy, if that value is at most `span` tokens back."""

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        choice = torch.zeros_like(ids)
        for row, tokens in enumerate(ids.tolist()):
            last: dict[int, int] = {}
            for time, token in enumerate(tokens):
                if token in KEYS:
                    # The answer is the token at time + 1, and the value stands one after its key.
                    if token in last and (time + 1) - (last[token] + 1) <= span:
                        choice[row, time] = tokens[last[token] + 1]
                    last[token] = time
        return functional.one_hot(choice, 260).float()

    return logits


def test_oracle_is_perfect_and_counts_every_answer(fake, probe) -> None:
    model = fake(lookup(1000))
    result = recall(model, probe, window=16, batch_size=5)
    assert (result.beyond, result.overall) == (1.0, 1.0)
    assert sum(row["count"] for row in result.by_distance) == 12 * 8 * 2
    assert all(row["accuracy"] == 1.0 and row["low"] < row["high"] for row in result.by_distance)
    assert model.calls == 3
    assert model.training
    assert model.part.training


def test_window_model_recalls_within_its_window_only(fake, probe) -> None:
    result = recall(fake(lookup(15)), probe, window=16, batch_size=12)
    assert result.beyond == 0.0
    distances = probe.distance_NT[probe.answer_NT]
    assert result.overall == pytest.approx((distances < 16).double().mean().item())
    assert 0 < result.overall < 1
    for row in result.by_distance:
        assert row["accuracy"] == (1.0 if row["high"] <= 16 else 0.0)
        assert row["count"] == int(((distances >= row["low"]) & (distances < row["high"])).sum())


def test_always_the_same_letter_is_right_by_chance(fake) -> None:
    probe = encode_probe(recall_documents(200, pairs=8, rounds=2, seed=1, values=4), Tokenizer.bytes(), 64)
    model = fake(lambda ids, positions: functional.one_hot(torch.full_like(ids, ord("a") + 4), 260).float())
    # 1600 answers, four letters: three standard deviations of the mean are 0.033.
    assert recall(model, probe, window=8, batch_size=200).overall == pytest.approx(0.25, abs=0.033)


def test_batch_size_and_positions(fake, probe) -> None:
    seen = []

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        seen.append(positions)
        return lookup(15)(ids, positions)

    one = recall(fake(logits), probe, window=16, batch_size=1)
    assert all(torch.equal(positions, torch.arange(127).unsqueeze(0)) for positions in seen)
    assert one == recall(fake(logits), probe, window=16, batch_size=100)


def test_default_edges_hold_the_window_and_cover(probe) -> None:
    distances = probe.distance_NT[probe.answer_NT]
    for window in (1, 12, 16, None):
        edges = distance_edges(probe, window)
        assert window is None or window in edges
        assert edges[0] <= distances.min()
        assert distances.max() < edges[-1]
        assert all(low < high for low, high in itertools.pairwise(edges))


def test_without_a_window(fake, probe) -> None:
    result = recall(fake(lookup(1000)), probe, window=None, batch_size=12, edges=[0, 20, 1000])
    assert result.beyond is None
    assert result.overall == 1.0
    assert [(row["low"], row["high"]) for row in result.by_distance] == [(0, 20), (20, 1000)]


def test_refusals(uniform, probe) -> None:
    with pytest.raises(ValueError, match="beyond the window of 500 tokens"):
        recall(uniform, probe, window=500, batch_size=4)
    with pytest.raises(ValueError, match="window is 0"):
        distance_edges(probe, 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        recall(uniform, probe, window=8, batch_size=0)
    with pytest.raises(ValueError, match="cover the distances"):
        recall(uniform, probe, window=8, batch_size=4, edges=[0, 10])
    with pytest.raises(ValueError, match="cover the distances"):
        recall(uniform, probe, window=8, batch_size=4, edges=[0, 0, 1000])
    empty = RecallSet(probe.tokens_NT, torch.zeros_like(probe.answer_NT), probe.distance_NT)
    with pytest.raises(ValueError, match="no answers"):
        recall(uniform, empty, window=8, batch_size=4)
    assert uniform.calls == 0
