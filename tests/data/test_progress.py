"""Progress: lines by number of documents where nobody watches, a moving line on a terminal."""

import io

import pytest
from rich.console import Console

from trihybrid.data import progress
from trihybrid.data.progress import DocumentProgress


def test_a_log_line_for_so_many_documents(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "DOCUMENTS_A_LINE", 10)
    with DocumentProgress("train", Console(file=io.StringIO())) as shown:
        for _ in range(7):
            shown.add(4, 1_000_000, 500_000)
    assert caplog.messages[:2] == [
        "data: train: 12 documents, 3.0 MB of text, 1.50 M tokens so far",
        "data: train: 20 documents, 5.0 MB of text, 2.50 M tokens so far",
    ]
    assert len(caplog.messages) == 3
    assert caplog.messages[2].startswith("data: train: 28 documents, 7.0 MB of text, 3.50 M tokens in ")


def test_a_terminal_gets_a_line_that_moves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    output = io.StringIO()
    with DocumentProgress("validation", Console(file=output, force_terminal=True, width=120)) as shown:
        shown.add(20_000, 1_000_000, 500_000)
    assert "validation: 20,000 documents, 1.0 MB of text, 0.50 M tokens" in output.getvalue()
    assert len(caplog.messages) == 1
