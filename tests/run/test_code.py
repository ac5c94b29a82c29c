"""The code's hash covers every source and nothing else."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import trihybrid
from trihybrid.run import code

PACKAGE = Path(trihybrid.__file__).parent


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package's sources that `code_hash` reads."""
    folder = tmp_path / "trihybrid"
    shutil.copytree(PACKAGE, folder, ignore=lambda _, names: [n for n in names if n == "__pycache__"])
    monkeypatch.setattr(code, "files", lambda name: folder)
    code.code_hash.cache_clear()
    yield folder
    code.code_hash.cache_clear()


def hashed() -> str:
    code.code_hash.cache_clear()
    return code.code_hash()


def test_it_is_the_hash_of_all_sources(copied: Path) -> None:
    rows = sorted(
        [path.relative_to(copied).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in copied.rglob("*.py")
    )
    assert len(rows) > 80
    text = json.dumps(rows, separators=(",", ":"))
    assert hashed() == hashlib.sha256(text.encode()).hexdigest()


def test_any_source_changes_it_and_nothing_else_does(copied: Path) -> None:
    before = hashed()
    (copied / "models" / "notes.txt").write_text("no source")
    assert hashed() == before
    source = copied / "ops" / "attention.py"
    source.write_text(source.read_text() + "\n")
    changed = hashed()
    assert changed != before
    source.rename(copied / "ops" / "attention2.py")
    assert len({before, changed, hashed()}) == 3


def test_a_bundle_carries_it(copied: Path) -> None:
    (copied / code.CARRIED).write_text("ab" * 32 + "\n")
    assert hashed() == "ab" * 32
    (copied / code.CARRIED).write_text("latest\n")
    with pytest.raises(ValueError, match=r"code_hash\.txt: 'latest' is no sha256"):
        hashed()
