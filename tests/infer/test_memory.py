"""What cannot fit is told in bytes before anything is allocated, and what the model was not made for in the log."""

import logging

import pytest
import torch

from small_student import make_student
from trihybrid.infer import memory, paging, states
from trihybrid.infer.engine import PAGE, Engine, EngineFull
from trihybrid.infer.states import Stored


def engine_bytes() -> tuple[int, int]:
    """A row and a token of the small student."""
    engine = Engine(make_student())
    return engine.bytes_of(0), engine.bytes_of(1) - engine.bytes_of(0)


def test_a_million_tokens_that_do_not_fit_are_refused_before_they_are_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row, token = engine_bytes()
    needed = 4 * row + 1_000_000 * token
    monkeypatch.setattr(states, "free_bytes", lambda device: needed - 1)

    def never(*_: object) -> Stored:
        raise AssertionError("allocated")

    monkeypatch.setattr(states.States, "_stored", never)
    message = (
        rf"rows is 4, of {row:,} bytes each, and tokens is 1,000,000, of {token}: together 0.06 GiB of cpu, where "
        r"0.06 GiB are free; take fewer rows or tokens"
    )
    with pytest.raises(ValueError, match=message):
        Engine(make_student(), rows=4, tokens=1_000_000)


def test_storage_that_cannot_grow_is_full_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubled where that fits, else by as much as is needed, else refused."""
    _, token = engine_bytes()
    engine = Engine(make_student(), rows=2)
    before = engine.memory()
    # 9 pages at the start; 20 more do not fit, beside the 9 old ones of the one layer.
    free = (20 + 9) * PAGE * token
    monkeypatch.setattr(states, "free_bytes", lambda device: free)
    with pytest.raises(
        EngineFull, match=r"room for 1,408 more tokens of keys and values needs 0.00 GiB of cpu"
    ):
        engine.add([3] * (30 * PAGE), most=1)
    assert (engine.memory(), engine.free_rows) == (before, 2)
    assert isinstance(engine._book, paging.PageBook)
    engine.add([3] * (28 * PAGE), most=1)
    assert engine.memory()["pages"] == 29 * PAGE * token


def test_what_linux_calls_available_is_free(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       99 kB\nMemAvailable:   12 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", file)
    assert memory.free_bytes(torch.device("cpu")) == 12 * 1024
    file.unlink()
    assert memory.free_bytes(torch.device("cpu")) is None
    assert memory.free_bytes(torch.device("meta")) is None


def test_tokens_beyond_the_positions_of_the_model_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """The small student was made for 128."""
    engine = Engine(make_student(), rows=3)
    with caplog.at_level(logging.WARNING):
        engine.add([3] * 120, most=9)
        assert caplog.text == ""
        engine.add([3] * 120, most=10)
        engine.add([3] * 120, most=11)
    assert len(caplog.records) == 1
    assert "of up to 129 tokens: the model's max_position_embeddings is 128" in caplog.text
