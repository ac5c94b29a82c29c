"""Prefetching: the same batches in any order, errors where they belong, and no thread left behind."""

import threading
from pathlib import Path

import pytest
import torch

from trihybrid.data.packing import Batch, PackedBatches
from trihybrid.data.prefetch import Prefetch
from trihybrid.data.shards import write_shards


@pytest.fixture
def batches(tmp_path: Path) -> PackedBatches:
    shards = write_shards(tmp_path, [list(range(3, 250))], 260, 2, text_bytes=0, tokenizer_hash="")
    return PackedBatches(shards, 9, 4, seed=0)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_any_order_of_steps_gives_the_same_batches(batches: PackedBatches, ahead: int) -> None:
    with Prefetch(batches.batch, ahead) as prefetch:
        for step in [0, 1, 2, 2, 3, 9, 10, 4, 0, 30, 29, 28]:
            made = prefetch(step)
            assert torch.equal(made.tokens_BT, batches.batch(step).tokens_BT)
            assert torch.equal(made.positions_BT, batches.batch(step).positions_BT)


def test_one_thread_makes_each_following_step_once(batches: PackedBatches) -> None:
    made: list[int] = []
    threads: set[str] = set()

    def batch(step: int) -> Batch:
        made.append(step)
        threads.add(threading.current_thread().name)
        return batches.batch(step)

    with Prefetch(batch, ahead=2) as prefetch:
        for step in range(6):
            prefetch(step)
    assert made[:6] == list(range(6))
    assert set(made) <= set(range(8))
    assert len(made) == len(set(made))
    assert len(threads) == 1
    assert threading.current_thread().name not in threads


def test_the_next_batch_is_made_while_the_caller_computes(batches: PackedBatches) -> None:
    ready = threading.Event()

    def batch(step: int) -> Batch:
        if step == 1:
            ready.set()
        return batches.batch(step)

    with Prefetch(batch) as prefetch:
        prefetch(0)
        assert ready.wait(timeout=60)


def test_an_error_comes_out_at_its_own_step(batches: PackedBatches) -> None:
    def batch(step: int) -> Batch:
        if step == 2:
            raise ValueError("step 2 is broken")
        return batches.batch(step)

    with Prefetch(batch, ahead=2) as prefetch:
        prefetch(0)
        prefetch(1)
        for _ in range(2):
            with pytest.raises(ValueError, match="step 2 is broken"):
                prefetch(2)
        assert torch.equal(prefetch(3).tokens_BT, batches.batch(3).tokens_BT)


def test_closing_ends_the_thread(batches: PackedBatches) -> None:
    before = set(threading.enumerate())
    prefetch = Prefetch(batches.batch)
    prefetch(0)
    assert len(set(threading.enumerate()) - before) == 1
    prefetch.close()
    prefetch.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError):
        prefetch(0)


def test_the_batch_is_handed_out_on_the_device(batches: PackedBatches) -> None:
    with Prefetch(batches.batch, device="meta") as prefetch:
        assert prefetch(0).tokens_BT.device.type == "meta"


@pytest.mark.gpu
def test_a_gpu_gets_the_same_numbers(batches: PackedBatches) -> None:
    with Prefetch(batches.batch, device="cuda") as prefetch:
        for step in range(20):
            assert torch.equal(prefetch(step).tokens_BT.cpu(), batches.batch(step).tokens_BT)


def test_nothing_ahead_is_refused(batches: PackedBatches) -> None:
    with pytest.raises(ValueError, match="ahead is 0"):
        Prefetch(batches.batch, 0)
