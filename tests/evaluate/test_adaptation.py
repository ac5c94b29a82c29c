"""Scored first, trained after: no score depends on an update that saw its target."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tiny_stream import BOS, FixedTable, MemoryShards, RunningMean, compact, random_stream
from trihybrid.evaluate import adaptation
from trihybrid.evaluate.adaptation import adaptation_chunks, adapted_bpb
from trihybrid.evaluate.section import AdaptationSection
from trihybrid.evaluate.stream import chunked_bpb, sliding_bpb

SMALL = settings(deadline=None, max_examples=30, derandomize=True)
TABLE = FixedTable()
SECTION = AdaptationSection(chunk_tokens=20, learning_rate=0.1, epochs=2, batch_size=2)


@SMALL
@given(tokens=st.integers(2, 150), length=st.integers(1, 30), chunk=st.integers(2, 60), data=st.data())
def test_every_target_is_scored_once_and_before_it_is_trained_on(tokens, length, chunk, data) -> None:
    stride = data.draw(st.integers(1, length))
    scored: list[int] = []
    trained: list[int] = []
    chunks = list(adaptation_chunks(tokens, length, stride, chunk))
    for part in chunks:
        fresh = [target for window in part.scored for target in range(window.first, window.stop + 1)]
        # Nothing that is scored now was an input or a target of training before, its context may have been.
        assert not set(fresh) & set(trained)
        scored += fresh
        learned = [target for window in part.trained for target in range(window.first, window.stop + 1)]
        assert all(window.stop - window.start <= length for window in part.trained)
        assert set(learned) <= set(scored)
        trained += learned
    assert scored == list(range(1, tokens))
    assert len(chunks) == math.ceil((tokens - 1) / chunk)
    assert trained == list(range(1, (len(chunks) - 1) * chunk + 1))
    assert chunks[-1].trained == []


@pytest.mark.parametrize("stride", [None, 3])
@pytest.mark.parametrize("isolated", [True, False])
def test_without_learning_it_is_the_score_of_the_fixed_model(stride, isolated) -> None:
    shards, model = MemoryShards(random_stream(107, seed=1)), RunningMean()
    section = SECTION.model_copy(update={"learning_rate": 0.0, "stride": stride})
    adapted = adapted_bpb(model, shards, TABLE, section, 8, isolated, 4)
    fixed = sliding_bpb(model, shards, TABLE, 8, stride or 8, isolated, 4)
    assert adapted.score.nats == pytest.approx(fixed.nats, rel=1e-12)
    assert (adapted.score.tokens, adapted.score.bytes) == (fixed.tokens, fixed.bytes)
    assert adapted.label == "score-first test-time training"
    # 20 targets in windows of 8, 8, 4; two windows a step, the short one alone; two epochs, five of six chunks.
    assert (len(adapted.chunk_nats), adapted.updates) == (6, 5 * 2 * 2)


def test_later_chunks_do_not_change_earlier_scores() -> None:
    model, section = RunningMean(), SECTION.model_copy(update={"chunk_tokens": 16})
    stream = random_stream(97, seed=2)
    before = adapted_bpb(model, MemoryShards(stream), TABLE, section, 8, True, 4).chunk_nats
    for chunk in range(6):
        # All that comes after the last target of the chunk.
        end = 16 * (chunk + 1) + 1
        changed = stream[:end] + [token if token == BOS else 12 - token for token in stream[end:]]
        after = adapted_bpb(model, MemoryShards(changed), TABLE, section, 8, True, 4).chunk_nats
        assert after[: chunk + 1] == before[: chunk + 1]
        assert all(x != y for x, y in zip(after[chunk + 1 :], before[chunk + 1 :], strict=True))


@pytest.mark.parametrize("skipped", [0, 2])
def test_training_on_a_chunk_changes_only_the_chunks_after_it(skipped, monkeypatch) -> None:
    shards, model = MemoryShards(random_stream(101, seed=2)), RunningMean()
    before = adapted_bpb(model, shards, TABLE, SECTION, 8, True, 4).chunk_nats
    train, calls = adaptation._train, []

    def but_one(*arguments) -> int:
        calls.append(arguments)
        return 0 if len(calls) == skipped + 1 else train(*arguments)

    monkeypatch.setattr(adaptation, "_train", but_one)
    after = adapted_bpb(model, shards, TABLE, SECTION, 8, True, 4).chunk_nats
    assert after[: skipped + 1] == before[: skipped + 1]
    assert all(x != y for x, y in zip(after[skipped + 1 :], before[skipped + 1 :], strict=True))


def test_it_learns_a_stream_that_repeats_and_leaves_the_model_alone() -> None:
    shards, model = MemoryShards([BOS, *([3, 7, 5, 9] * 60)]), RunningMean()
    model.train()
    model.embedding.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    fixed = chunked_bpb(model, shards, TABLE, 8, True, 4)
    adapted = adapted_bpb(model, shards, TABLE, SECTION, 8, True, 4)
    assert adapted.score.decoded < 0.7 * fixed.decoded
    assert adapted.score.nats == pytest.approx(math.fsum(adapted.chunk_nats), rel=1e-12)
    assert model.training
    assert model.calls == math.ceil(math.ceil(240 / 8) / 4)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [p.grad for p in model.parameters()] == [None, None]
    assert [p.requires_grad for p in model.parameters()] == [False, True]


def test_compact_model_learns_and_stays_as_it_was() -> None:
    shards, model = MemoryShards([BOS, *([3, 7, 5, 9] * 24)]), compact(torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    section = AdaptationSection(chunk_tokens=24, learning_rate=0.1, epochs=4, batch_size=2)
    adapted = adapted_bpb(model, shards, TABLE, section, 12, True, 4)
    assert adapted.score.nats < 0.7 * chunked_bpb(model, shards, TABLE, 12, True, 4).nats
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_first_updates_are_clipped_sgd_with_momentum_on_a_cosine() -> None:
    """Three chunks, by hand: lr, lr / 2, and the last not trained."""
    stream, model = random_stream(25, seed=4, documents=1), RunningMean()
    section = AdaptationSection(
        chunk_tokens=8, learning_rate=0.2, momentum=0.5, epochs=1, clip=0.1, batch_size=4
    )
    found = adapted_bpb(model, MemoryShards(stream), TABLE, section, 8, False, 4).chunk_nats
    by_hand = RunningMean()
    velocity = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    expected = []
    for chunk, rate in enumerate((0.2, 0.1, 0.0)):
        window = stream[8 * chunk : 8 * chunk + 9]
        expected.append(math.fsum(by_hand.nats(window)))
        x_TD = by_hand.embedding[torch.tensor(window[:-1])]
        hidden_TD = torch.cat([(x_TD.cumsum(0) / torch.arange(1, 9)[:, None]).tanh(), x_TD], -1)
        torch.nn.functional.cross_entropy(by_hand.logits(hidden_TD), torch.tensor(window[1:])).backward()
        norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm()
        assert norm > 0.1
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                velocity[name] = 0.5 * velocity[name] + p.grad * 0.1 / (norm + 1e-6)
                p -= rate * velocity[name]
                p.grad = None
    assert found == pytest.approx(expected, rel=1e-10)


def test_refusals() -> None:
    shards = MemoryShards(random_stream(50, seed=0))
    with pytest.raises(ValueError, match="length is 8 and stride 9"):
        adapted_bpb(RunningMean(), shards, TABLE, SECTION.model_copy(update={"stride": 9}), 8, True, 4)
    broken = RunningMean()
    broken.logits = lambda hidden: Explode.apply(hidden @ broken.head.T)
    with pytest.raises(
        ValueError, match=r"gradient norm of nan at token 0 of the stream; learning_rate is 0\.1: lower it"
    ):
        adapted_bpb(broken, shards, TABLE, SECTION, 8, True, 4)
    for wrong in (
        {"chunk_tokens": 1},
        {"momentum": 1.0},
        {"epochs": 0},
        {"clip": 0},
        {"stride": 0},
        {"rate": 1},
    ):
        with pytest.raises(ValidationError):
            AdaptationSection(**wrong)


class Explode(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, torch.inf)
