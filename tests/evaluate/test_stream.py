"""Every target once, in every mode; contexts as promised; bytes and refusals."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_stream import BOS, VOCABULARY, FixedTable, MemoryShards, RunningMean, compact, random_stream
from trihybrid.data import write_shards
from trihybrid.evaluate import stream as stream_module
from trihybrid.evaluate.stream import (
    chunked_bpb,
    read_stream,
    sliding_bpb,
    sliding_windows,
    stateful_bpb,
    window_nats,
)

SMALL = settings(deadline=None, max_examples=30, derandomize=True)
TABLE = FixedTable()


def documents_of(tokens: list[int]) -> list[list[int]]:
    """Each document with the BOS of the next one, which it has to predict."""
    borders = [place for place, token in enumerate(tokens) if token == BOS]
    return [
        tokens[low : high + 1] for low, high in zip(borders, [*borders[1:], len(tokens) - 1], strict=True)
    ]


def nats_by_place(scored) -> dict[int, float]:
    """Place of each target -> its nats; a place that comes twice fails."""
    found: dict[int, float] = {}
    for places, nats in scored:
        assert len(places) == len(nats)
        for place, nat in zip(places.tolist(), nats.tolist(), strict=True):
            assert place not in found
            found[place] = nat
    return found


@SMALL
@given(tokens=st.integers(2, 200), length=st.integers(1, 40), data=st.data())
def test_sliding_counts_every_target_once_with_its_context(tokens, length, data) -> None:
    stride = data.draw(st.integers(1, length))
    windows = list(sliding_windows(tokens, length, stride))
    targets = [target for window in windows for target in range(window.first, window.stop + 1)]
    assert targets == list(range(1, tokens))
    for number, window in enumerate(windows):
        assert window.start == number * stride
        assert window.start < window.first <= window.stop <= window.start + length
        # Only the first window scores a token that sees fewer than length - stride + 1 tokens.
        assert number == 0 or window.first - window.start == length - stride + 1
    assert len(windows) == 1 + max(0, math.ceil((tokens - 1 - length) / stride))


@SMALL
@given(tokens=st.integers(2, 60), length=st.integers(1, 25), rows=st.integers(1, 5), isolated=st.booleans())
def test_chunked_equals_each_window_alone(tokens, length, rows, isolated) -> None:
    stream, model = random_stream(tokens, seed=tokens), RunningMean()
    array = np.array(stream, dtype=np.uint16)
    bos_id = BOS if isolated else None
    windows = sliding_windows(tokens, length, length)
    found = nats_by_place(window_nats(model, array, windows, bos_id, rows))
    expected = []
    for start in range(0, tokens - 1, length):
        window = stream[start : start + length + 1]
        # Without isolation a BOS inside a window is a token like others; the window's last target never restarts.
        inner = [p for p in range(1, len(window) - 1) if window[p] == BOS] if isolated else []
        for low, high in zip([0, *inner], [*inner, len(window) - 1], strict=True):
            expected += model.nats(window[low : high + 1])
    assert [found[place] for place in range(1, tokens)] == pytest.approx(expected, rel=1e-10)
    score = chunked_bpb(model, MemoryShards(stream), TABLE, length, isolated, rows)
    assert (score.tokens, score.nats) == (tokens - 1, pytest.approx(math.fsum(expected), rel=1e-10))


@SMALL
@given(tokens=st.integers(2, 60), length=st.integers(2, 25), isolated=st.booleans())
def test_sliding_scores_the_tail_of_its_windows(tokens, length, isolated) -> None:
    shards, model = MemoryShards(random_stream(tokens, seed=tokens)), RunningMean()
    bos_id = BOS if isolated else None
    stride = length // 2
    windows = list(sliding_windows(tokens, length, stride))
    found = nats_by_place(window_nats(model, shards.stream, windows, bos_id, 4))
    for window in windows:
        alone = stream_module.Window(window.start, window.stop, window.start + 1)
        whole = nats_by_place(window_nats(model, shards.stream, [alone], bos_id, 1))
        for place in range(window.first, window.stop + 1):
            assert found[place] == pytest.approx(whole[place], rel=1e-10)
    score = sliding_bpb(model, shards, TABLE, length, stride, isolated, 3)
    assert score.tokens == tokens - 1 == len(found)
    assert score.nats == pytest.approx(math.fsum(found.values()), rel=1e-12)


@SMALL
@given(tokens=st.integers(2, 80), length=st.integers(1, 30), rows=st.integers(1, 6))
def test_stateful_isolated_equals_each_document_in_one_forward(tokens, length, rows) -> None:
    stream, model = random_stream(tokens, seed=tokens), RunningMean()
    expected = [nat for document in documents_of(stream) for nat in model.nats(document)]
    score = stateful_bpb(model, MemoryShards(stream), TABLE, length, True, rows)
    assert score.tokens == len(expected) == tokens - 1
    assert score.nats == pytest.approx(math.fsum(expected), rel=1e-10)


@SMALL
@given(tokens=st.integers(2, 80), length=st.integers(1, 30))
def test_stateful_flat_equals_one_long_forward(tokens, length) -> None:
    stream, model = random_stream(tokens, seed=tokens), RunningMean()
    score = stateful_bpb(model, MemoryShards(stream), TABLE, length, False, 1)
    assert score.nats == pytest.approx(math.fsum(model.nats(stream)), rel=1e-10)
    assert model.calls == math.ceil((tokens - 1) / length)


@SMALL
@given(tokens=st.integers(2, 80), rows=st.integers(1, 6))
def test_parallel_parts_are_runs_of_whole_documents(tokens, rows) -> None:
    stream, model = random_stream(tokens, seed=tokens, documents=8), RunningMean()
    parts = stream_module._parts(np.array(stream), BOS, rows)
    assert 1 <= len(parts) <= rows
    assert [parts[0][0], parts[-1][1]] == [0, tokens - 1]
    assert all(before[1] == after[0] for before, after in pairwise(parts))
    assert all(stream[start] == BOS for start, stop in parts)
    assert all(start < stop for start, stop in parts)
    expected = [nat for start, stop in parts for nat in model.nats(stream[start : stop + 1])]
    score = stateful_bpb(model, MemoryShards(stream), TABLE, 7, False, rows)
    assert model.calls == math.ceil(max(stop - start for start, stop in parts) / 7)
    assert score.nats == pytest.approx(math.fsum(expected), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("length", "rows"), [(5, 1), (16, 3)])
def test_compact_states_equal_one_long_forward(dtype, length, rows) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    stream, model = random_stream(48, seed=7), compact(dtype)
    shards = MemoryShards(stream)
    whole = chunked_bpb(model, shards, TABLE, 100, False, 1)
    assert stateful_bpb(model, shards, TABLE, length, False, 1).nats == pytest.approx(
        whole.nats, rel=tolerance
    )
    packed = chunked_bpb(model, shards, TABLE, 100, True, 1)
    assert packed.nats != pytest.approx(whole.nats, rel=1e-3)
    isolated = stateful_bpb(model, shards, TABLE, length, True, rows)
    assert isolated.nats == pytest.approx(packed.nats, rel=tolerance)


@pytest.mark.parametrize("isolated", [True, False])
def test_compact_windows_in_a_batch_equal_each_alone(isolated) -> None:
    shards, model = MemoryShards(random_stream(70, seed=8)), compact(torch.float64)
    for stride in (3, 12):
        alone = sliding_bpb(model, shards, TABLE, 12, stride, isolated, 1)
        assert sliding_bpb(model, shards, TABLE, 12, stride, isolated, 64).nats == pytest.approx(
            alone.nats, rel=1e-10
        )


def test_stateful_batches_are_bounded_in_tokens() -> None:
    tokens = [BOS, *([3] * 99), *([BOS, 4, 5, 6] * 10)]
    shapes = []

    class Recorder(RunningMean):
        def hidden(self, tokens_BT, span, states=None):
            shapes.append((tokens_BT.shape[0], span.start, span.length))
            return super().hidden(tokens_BT, span, states)

    stateful_bpb(Recorder(), MemoryShards(tokens), TABLE, 16, True, 2)
    long = [(1, start, min(16, 100 - start)) for start in range(0, 100, 16)]
    # Two rows of 16 tokens hold eight documents of four.
    assert shapes == [*long, (8, 0, 4), (2, 0, 4)]


def test_bits_are_nats_by_decoded_and_raw_bytes(tmp_path) -> None:
    documents = [[5, 2, 7, 10], [2, 3], [9]]
    shards = write_shards(
        tmp_path, documents, VOCABULARY, BOS, text_bytes=50, tokenizer_hash="-", tokens_per_shard=4
    )
    model = RunningMean()
    model.head.data.zero_()
    score = chunked_bpb(model, shards, TABLE, 4, True, 2)
    assert score.tokens == 9
    assert score.bytes == 5 + 2 + 6 + 10 + 2 + 2 + 9
    bits = 9 * math.log2(VOCABULARY)
    assert score.nats == pytest.approx(9 * math.log(VOCABULARY), rel=1e-12)
    assert (score.decoded, score.raw) == pytest.approx((bits / score.bytes, bits / 50), rel=1e-12)
    for limited in (
        chunked_bpb(model, shards, TABLE, 4, True, 2, limit_tokens=4),
        sliding_bpb(model, shards, TABLE, 4, 2, True, 2, limit_tokens=4),
        stateful_bpb(model, shards, TABLE, 4, True, 2, limit_tokens=4),
    ):
        assert (limited.tokens, limited.bytes, limited.raw) == (3, 5 + 2 + 6, None)
    assert chunked_bpb(model, shards, TABLE, 4, True, 2, limit_tokens=1000) == score
    assert chunked_bpb(model, MemoryShards([BOS, 5], 0), TABLE, 4, True, 2).raw is None


def test_small_pieces_of_bytes_and_logits_give_the_same_score(monkeypatch) -> None:
    shards, model = MemoryShards(random_stream(150, seed=3)), RunningMean()
    expected = chunked_bpb(model, shards, TABLE, 20, True, 4)
    largest = []
    logits = model.logits
    monkeypatch.setattr(
        model, "logits", lambda hidden: (largest.append(hidden.shape[0] * VOCABULARY), logits(hidden))[1]
    )
    monkeypatch.setattr(stream_module, "LOGIT_ELEMENTS", 5 * VOCABULARY)
    monkeypatch.setattr(stream_module, "COUNTED_TOKENS", 7)
    score = chunked_bpb(model, shards, TABLE, 20, True, 4)
    assert score.bytes == expected.bytes
    assert score.nats == pytest.approx(expected.nats, rel=1e-12)
    assert max(largest) == 5 * VOCABULARY


def test_flags_come_back_and_nothing_waits_for_a_gradient() -> None:
    model = RunningMean()
    model.train()
    for places, nats in window_nats(model, np.array([BOS, 3, 4]), sliding_windows(3, 2, 2), BOS, 1):
        assert places.tolist() == [1, 2]
        assert not nats.requires_grad
        assert model.training
        assert torch.is_grad_enabled()


def test_refusals() -> None:
    model, shards = RunningMean(), MemoryShards([BOS, 3, 4, 5])
    for stride in (0, 5):
        with pytest.raises(ValueError, match=f"length is 4 and stride {stride}: needs 1 <= stride <= length"):
            sliding_bpb(model, shards, TABLE, 4, stride, True, 1)
    with pytest.raises(ValueError, match="length is 0"):
        chunked_bpb(model, shards, TABLE, 0, True, 1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        chunked_bpb(model, shards, TABLE, 4, True, 0)
    for length, rows in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"length is {length} and batch_size {rows}"):
            stateful_bpb(model, shards, TABLE, length, False, rows)
    with pytest.raises(ValueError, match="limit_tokens is 1"):
        chunked_bpb(model, shards, TABLE, 4, True, 1, limit_tokens=1)
    with pytest.raises(ValueError, match="holds 1 tokens"):
        read_stream(model, MemoryShards([BOS]), None)
    with pytest.raises(ValueError, match="token id 11, and the model's vocabulary has 11 tokens"):
        chunked_bpb(model, MemoryShards([BOS, 11]), TABLE, 4, True, 1)
    with pytest.raises(ValueError, match="decode to no byte"):
        chunked_bpb(model, MemoryShards([BOS, BOS]), TABLE, 4, True, 1)
    model.head.data[3] = torch.nan
    with pytest.raises(ValueError, match="not finite for 3 of 3 tokens"):
        chunked_bpb(model, shards, TABLE, 4, True, 1)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_near_float32_and_bounded_in_memory() -> None:
    shards = MemoryShards(random_stream(4000, seed=9, documents=30))
    expected = [score(compact(torch.float32), shards) for score in MODES]
    found = [score(compact(torch.bfloat16).cuda(), shards) for score in MODES]
    assert [score.nats for score in found] == pytest.approx([score.nats for score in expected], rel=2e-2)
    torch.cuda.reset_peak_memory_stats()
    model = RunningMean().cuda()
    hidden_ND, targets_N = (
        torch.zeros(2**16, 12, device="cuda").double(),
        torch.zeros(2**16, device="cuda").long(),
    )
    before = torch.cuda.memory_allocated()
    model.vocabulary, model.head = 1024, torch.nn.Parameter(torch.zeros(1024, 12, device="cuda").double())
    with torch.inference_mode():
        stream_module._target_nats(model, hidden_ND, targets_N)
    # Two float64 tensors of LOGIT_ELEMENTS, logits and their logarithms of probabilities, and some more.
    assert torch.cuda.max_memory_allocated() - before < 4 * 8 * stream_module.LOGIT_ELEMENTS


MODES = (
    lambda model, shards: chunked_bpb(model, shards, TABLE, 256, True, 8),
    lambda model, shards: chunked_bpb(model, shards, TABLE, 256, False, 8),
    lambda model, shards: sliding_bpb(model, shards, TABLE, 256, 64, True, 16),
    lambda model, shards: stateful_bpb(model, shards, TABLE, 64, True, 8),
    lambda model, shards: stateful_bpb(model, shards, TABLE, 64, False, 4),
)
