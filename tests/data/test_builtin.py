"""The builtin text: enough of it, distinct, the same every time."""

import sys
from pathlib import Path

import pytest

from trihybrid.data import builtin
from trihybrid.data.text import read_documents


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return read_documents("builtin")


def test_more_than_a_megabyte_of_distinct_documents(documents: list[str]) -> None:
    assert sum(len(document.encode()) for document in documents) > 1_000_000
    assert len({" ".join(document.split()) for document in documents}) == len(documents)
    assert all(document.strip() for document in documents)


def test_topics_come_first_and_docstrings_are_cleaned(documents: list[str]) -> None:
    assert documents[0].startswith('The "assert" statement')
    assert any(document.startswith("Heap queue algorithm (a.k.a. priority queue).") for document in documents)


def test_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "MODULES", ("turtle", "heapq"))
    before = set(sys.modules)
    first = builtin.python_documentation()
    assert set(sys.modules) == before
    assert builtin.python_documentation() == first


def test_docstrings_of_a_file(tmp_path: Path) -> None:
    text = "word, " * 49 + "word"
    source = (
        f'"""{text}"""\nclass A:\n    """short"""\n    def f(self):\n        r"""x\n          {text}\\d"""\n'
    )
    file = tmp_path / "module.py"
    file.write_text(source + '"\\d"\n')  # an invalid escape: a warning on parsing, silenced
    assert list(builtin._docstrings(file)) == [text, f"x\n{text}\\d"]


def test_a_missing_module_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(builtin, "MODULES", ("no_such_module",))
    assert builtin.python_documentation()
    assert "no_such_module" in caplog.text
