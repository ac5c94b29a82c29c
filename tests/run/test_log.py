"""Rows come back as they were written, once each, and only a torn last one is forgiven."""

import io
import json
import logging
import mmap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.run import RunLog, StepRecord, memory_bytes, read_log


def record(step: int, steps: int = 100, **metrics: float) -> StepRecord:
    return StepRecord(
        step=step,
        steps=steps,
        loss=2.0 / (step + 1),
        learning_rate=1e-3,
        gradient_norm=0.5,
        tokens=1000 * (step + 1),
        tokens_per_second=500.0,
        seconds=2.0 * (step + 1),
        metrics=metrics,
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_row_has_these_fields(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log.jsonl", "align", stream=io.StringIO()) as log:
        log.step(record(0, accuracy=0.25))
    (row,) = read_log(tmp_path / "log.jsonl")
    assert 1e6 < row.pop("memory_bytes") < 1e13
    assert row == {
        "kind": "train",
        "stage": "align",
        "step": 0,
        "steps": 100,
        "loss": 2.0,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "tokens": 1000,
        "tokens_per_second": 500.0,
        "seconds": 2.0,
        "accuracy": 0.25,
    }


def test_rows_are_on_disk_at_once_and_later_ones_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = RunLog(path, "align", stream=io.StringIO())
    first.event("plan", {"bytes": 3, "layers": [1, 2]})
    event = {"kind": "event", "event": "plan", "stage": "align", "bytes": 3, "layers": [1, 2]}
    assert read_log(path) == [event]
    RunLog(path, "match", stream=io.StringIO()).event("plan", {})
    assert [row["stage"] for row in read_log(path)] == ["align", "match"]
    assert read_log(tmp_path / "absent.jsonl") == []


def test_resume_drops_what_will_be_repeated_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    other = RunLog(path, "align", stream=io.StringIO())
    log = RunLog(path, "match", stream=io.StringIO())
    for step in range(5):
        other.step(record(step))
        log.step(record(step))
    log.event("evaluation", {"step": 4, "bpb": 1.0})
    log.event("note", {"text": "no step"})
    log.resume(3)
    log.step(record(3))
    rows = read_log(path)
    assert [row["step"] for row in rows if row["stage"] == "align"] == [0, 1, 2, 3, 4]
    assert [row.get("step") for row in rows if row["stage"] == "match"] == [0, 1, 2, None, 3]
    before = path.stat().st_ino
    log.resume(4)
    assert path.stat().st_ino == before  # nothing to drop, nothing rewritten
    assert [item.name for item in tmp_path.iterdir()] == ["log.jsonl"]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(cut=st.integers(1, 40))
def test_torn_last_row_is_forgiven_and_repaired(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    rows = [{"number": 0}, {"text": "x" * 40}]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(whole[:-cut])
    kept = rows if cut == 1 else rows[:1]  # without its newline alone, the row is whole
    assert read_log(path) == kept
    RunLog(path, "align", stream=io.StringIO()).event("go", {})
    assert read_log(path) == [*kept, {"kind": "event", "event": "go", "stage": "align"}]


def test_torn_row_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"')
    with caplog.at_level(logging.WARNING):
        read_log(path)
        RunLog(path, "align")
    assert "last line (2) is torn" in caplog.text and "torn last row of 4 bytes" in caplog.text


@pytest.mark.parametrize("bad", [b'{"a": 1', b"", b"3", b"[]", b"\xff\xfe", b"\x00\x00"])
def test_any_other_bad_line_is_an_error(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bad + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"log.jsonl:2: not a JSON object"):
        read_log(path)
    path.write_bytes(b'{"a": 1}\n' + bad + b"\n")  # last, but with its newline: not torn
    with pytest.raises(ValueError, match=r"log.jsonl:2: not a JSON object"):
        read_log(path)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log.jsonl", "align", stream=io.StringIO()) as log:
        log.step(record(0, ratio=float("nan"), bound=float("inf")))
    (row,) = read_log(tmp_path / "log.jsonl")
    assert row["ratio"] is None and row["bound"] is None
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_names_of_the_log_cannot_be_taken(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", "align", stream=io.StringIO())
    with pytest.raises(ValueError, match="names loss belong to the log"):
        log.step(record(0, loss=1.0))
    with pytest.raises(ValueError, match="names event, stage belong"):
        log.event("a", {"stage": "x", "event": "y"})
    with pytest.raises(ValueError, match="not plain JSON"):
        log.event("a", {"path": Path("x")})
    with pytest.raises(ValueError, match="every: 0"):
        RunLog(tmp_path / "log.jsonl", "align", every=0)
    assert read_log(tmp_path / "log.jsonl") == []


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path / "log.jsonl", "align", every=4, stream=stream) as log:
        for step in range(10):
            log.step(record(step, steps=10))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["4/10", "8/10", "10/10"]
    # 1,000 tokens in 2 seconds a step; 6 of 10 steps are left.
    assert lines[0].startswith("align 4/10  loss 0.5000  500 tokens/s  ETA 0:00:12  memory ")
    assert "ETA 0:00:00" in lines[2]
    assert len(read_log(tmp_path / "log.jsonl")) == 10


def test_bar_on_a_terminal_shows_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with RunLog(tmp_path / "log.jsonl", "align", every=4, stream=stream) as log:
        for step in range(10):
            log.step(record(step, steps=10))
    shown = stream.getvalue()
    assert "10/10" in shown and "loss 0.2000" in shown and "500 tokens/s" in shown and "GiB" in shown
    log.close()
    assert stream.getvalue() == shown


def test_memory_grows_with_what_is_held() -> None:
    before = memory_bytes()
    # Pages of its own: what other tests gave back may still be resident, and an allocator would take that.
    with mmap.mmap(-1, 64 * 2**20) as held:
        for place in range(0, len(held), mmap.PAGESIZE):
            held[place] = 1
        assert memory_bytes() - before > 48 * 2**20
