"""`trihybrid chat` answers lines and obeys commands, and an error of the user ends nothing."""

import io
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest


def talk(micro: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    result = micro.trihybrid("chat", folder, "--tokens", 8, "--temperature", 0, "--seed", 1)
    assert result.code == 0
    return result.stdout, result.stderr


def test_a_conversation_is_saved_and_goes_on(
    micro: ModuleType, micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tmp_path / "talk.session", micro_run / "matched"
    text, complaints = talk(
        micro, folder, monkeypatch, "/save now", "the slow river", f"/save {path}", "runs past", "/stats", "/dance",
        "/load", "/quit", "never read",
    )  # fmt: skip
    assert "error: nothing was said yet" in complaints
    assert "/dance is no command" in complaints and "name a file" in complaints
    answers = text.split("> ")
    stated = re.search(r"a state of ([\d,]+) tokens: ([\d,]+) bytes", text)
    written = re.search(r"talk\.session: ([\d,]+) bytes", text.replace("\n", ""))
    assert stated and written
    assert 0 < int(written[1].replace(",", "")) - int(stated[2].replace(",", "")) < 10_000
    assert "4 messages" in answers[5] and "tokens/s" in answers[5]

    again, _ = talk(micro, folder, monkeypatch, f"/load {path}", "runs past")
    assert "2 messages" in again
    assert again.split("> ")[2] == answers[4]
