"""Packing: every window once an epoch, a batch from its step alone, borders that no target crosses."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.data.packing import PackedBatches, sequential
from trihybrid.data.shards import TokenShards, write_shards

BOS = 2


def shards_of(folder: Path, lengths: list[int]) -> TokenShards:
    """Documents of these lengths whose tokens count up, so that a token names its place in the stream."""
    tokens = iter(range(3, 60_000))
    documents = [[next(tokens) for _ in range(length)] for length in lengths]
    return write_shards(folder, documents, 60_000, BOS, text_bytes=0, tokenizer_hash="", tokens_per_shard=50)


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    return shards_of(tmp_path, [30, 1, 2, 90, 5, 5, 60])


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    length=st.integers(1, 20),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 2**64 - 1),
    epochs=st.integers(1, 3),
)
def test_each_epoch_shows_each_window_once(
    tmp_path_factory: pytest.TempPathFactory, length: int, batch_size: int, seed: int, epochs: int
) -> None:
    batches = PackedBatches(
        shards_of(tmp_path_factory.mktemp("s"), [30, 1, 2, 90, 23]), length, batch_size, seed
    )
    assert batches.windows == 150 // length
    rows = batches.windows * epochs
    seen = [window for step in range(-(-rows // batch_size)) for window in batches.windows_of(step)]
    for epoch in range(epochs):
        part = seen[epoch * batches.windows : (epoch + 1) * batches.windows]
        assert sorted(part) == list(range(batches.windows))


def test_no_target_is_lost_or_repeated_in_an_epoch(shards: TokenShards) -> None:
    batches = PackedBatches(shards, 10, 1, seed=3)
    seen: Counter[int] = Counter()
    for step in range(batches.windows):
        targets = batches.batch(step).targets
        seen.update(targets[targets != -100].tolist())
    shown = shards.tokens(1, batches.windows * 10 + 1)
    assert seen == Counter(shown[shown != BOS].tolist())
    assert len(shards) - 1 - batches.windows * 10 < 10


def test_a_batch_depends_on_the_step_alone(shards: TokenShards) -> None:
    forward = PackedBatches(shards, 7, 4, seed=5)
    expected = [forward.batch(step).tokens_BT for step in range(30)]
    other = PackedBatches(shards, 7, 4, seed=5)
    for step in [29, 0, 17, 17, 3, 28, 1]:
        assert torch.equal(other.batch(step).tokens_BT, expected[step])
    assert 29 * 4 // forward.windows == 4  # the last steps lie in a later epoch
    different = PackedBatches(shards, 7, 4, seed=6)
    assert [forward.windows_of(step).tolist() for step in range(6)] != [
        different.windows_of(step).tolist() for step in range(6)
    ]


def test_the_order_is_pinned(tmp_path: Path) -> None:
    """Numbers that must never change: a run resumed with another numpy would see other data."""
    batches = PackedBatches(shards_of(tmp_path, [100]), 10, 5, seed=1)
    assert [batches.windows_of(step).tolist() for step in range(4)] == [
        [3, 5, 2, 9, 7],
        [0, 8, 6, 1, 4],
        [0, 6, 5, 3, 4],
        [9, 7, 8, 2, 1],
    ]


def test_without_a_seed_the_order_is_that_of_the_stream(tmp_path: Path) -> None:
    batches = PackedBatches(shards_of(tmp_path, [100]), 10, 4, seed=None)
    assert [batches.windows_of(step).tolist() for step in range(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 1],
        [2, 3, 4, 5],
    ]


def test_epochs_differ(shards: TokenShards) -> None:
    batches = PackedBatches(shards, 2, 1, seed=0)
    epochs = [
        tuple(batches.windows_of(epoch * batches.windows + step)[0] for step in range(batches.windows))
        for epoch in range(3)
    ]
    assert len(set(epochs)) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_the_global_batch(shards: TokenShards, world: int) -> None:
    batches = PackedBatches(shards, 9, 6, seed=0)
    whole = batches.batch(4)
    for rank in range(world):
        part = batches.batch(4, rank, world)
        assert torch.equal(part.tokens_BT, whole.tokens_BT[rank::world])
        assert torch.equal(part.positions_BT, whole.positions_BT[rank::world])


def test_rows_are_the_windows_of_the_stream(shards: TokenShards) -> None:
    batches = PackedBatches(shards, 9, 3, seed=0)
    for window, row in zip(batches.windows_of(2), batches.batch(2).tokens_BT, strict=True):
        assert row.tolist() == shards.tokens(window * 9, window * 9 + 10).tolist()


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=8),
    length=st.integers(1, 30),
    batch_size=st.integers(1, 4),
)
def test_positions_restart_and_evaluation_sees_each_target_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, batch_size: int
) -> None:
    shards = shards_of(tmp_path_factory.mktemp("s"), lengths)
    targets = []
    for batch in sequential(shards, length, batch_size):
        assert batch.tokens_BT.dtype == batch.positions_BT.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape == batch.targets.shape == batch.positions.shape
        for row, places in zip(batch.tokens_BT.tolist(), batch.positions_BT.tolist(), strict=True):
            assert places[0] == 0
            for column in range(1, length + 1):
                assert places[column] == (0 if row[column] == BOS else places[column - 1] + 1)
        following = batch.tokens_BT[:, 1:]
        assert torch.equal(batch.targets, torch.where(following == BOS, -100, following))
        targets.append(batch.targets.flatten())
    flat = torch.cat(targets)
    stream = shards.tokens(0, len(shards))
    assert flat[flat != -100].tolist() == stream[stream != BOS].tolist()


def test_a_limit_cuts_the_stream(shards: TokenShards) -> None:
    batches = list(sequential(shards, 10, 3, limit=45))
    assert [batch.inputs.shape[0] for batch in batches] == [3, 2]
    flat = torch.cat([batch.targets.flatten() for batch in batches])
    stream = shards.tokens(0, 45)
    assert flat[flat != -100].tolist() == stream[stream != BOS].tolist()
    assert batches[-1].positions_BT[-1].tolist() == [*range(5), 0, 0, 0, 0, 0, 0]


def test_a_batch_moves_to_a_device(shards: TokenShards) -> None:
    moved = PackedBatches(shards, 5, 2, 0).batch(0).to("meta")
    assert moved.tokens_BT.device.type == moved.positions_BT.device.type == "meta"


def test_parts_of_a_batch_are_its_rows(shards: TokenShards) -> None:
    batch = PackedBatches(shards, 5, 6, 0).batch(3)
    for parts in (1, 2, 3, 6):
        made = batch.split(parts)
        assert len(made) == parts
        assert torch.equal(torch.cat([part.tokens_BT for part in made]), batch.tokens_BT)
        assert torch.equal(torch.cat([part.positions_BT for part in made]), batch.positions_BT)
    for parts in (0, -1, 4, 7):
        with pytest.raises(
            ValueError, match=f"parts is {parts}, must be at least 1 and divide the batch of 6"
        ):
            batch.split(parts)


def test_parts_of_rows_have_their_own_targets(shards: TokenShards) -> None:
    batch = PackedBatches(shards, 12, 3, seed=1).batch(0)
    for count in (1, 2, 3, 12):
        parts = [batch.part(index, count) for index in range(count)]
        assert {part.inputs.shape for part in parts} == {(3, 12 // count)}
        for name in ("inputs", "targets", "positions", "next_tokens"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(batch, name))
    for index, count in ((0, 5), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=rf"index is {index} of count {count}, in rows of 12 tokens"):
            batch.part(index, count)


def test_next_tokens_ignore_no_border(shards: TokenShards) -> None:
    batch = PackedBatches(shards, 20, 5, 0).batch(0)
    assert torch.equal(batch.next_tokens[:, :-1], batch.inputs[:, 1:])
    assert (batch.next_tokens == BOS).any()
    borders = batch.targets == -100
    assert torch.equal(batch.next_tokens == BOS, borders)
    assert torch.equal(batch.next_tokens[~borders], batch.targets[~borders])


def test_bad_arguments_are_refused(shards: TokenShards) -> None:
    with pytest.raises(
        ValueError, match="200 tokens give 9 windows of sequence_length 20, fewer than batch_size 10"
    ):
        PackedBatches(shards, 20, 10, 0)
    with pytest.raises(ValueError, match="sequence_length is 0"):
        PackedBatches(shards, 0, 1, 0)
    with pytest.raises(ValueError, match="batch_size 0"):
        next(sequential(shards, 1, 0))
    with pytest.raises(ValueError, match="limit is 1"):
        next(sequential(shards, 1, 1, limit=1))
    with pytest.raises(ValueError, match="seed is -1"):
        PackedBatches(shards, 5, 1, -1)
    batches = PackedBatches(shards, 5, 4, 0)
    with pytest.raises(ValueError, match="step is -1"):
        batches.batch(-1)
    for rank, world in ((2, 2), (-1, 2), (0, 0), (0, 3)):
        with pytest.raises(ValueError, match="world divides"):
            batches.batch(0, rank, world)


def test_tokens_are_wide_enough_for_an_embedding(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [[65_535] * 5], 65_536, BOS, text_bytes=0, tokenizer_hash="")
    assert PackedBatches(shards, 5, 1, 0).batch(0).targets.max() == np.iinfo(np.uint16).max


def test_a_batch_is_named_by_its_windows(shards: TokenShards) -> None:
    batches = PackedBatches(shards, 10, 4, None)
    assert batches.name(1) == f"windows 4 (40-50), 5 (50-60), 6 (60-70), 7 (70-80) of {shards.folder}"
    assert batches.name(1, 1, 2) == f"windows 5 (50-60), 7 (70-80) of {shards.folder}"
