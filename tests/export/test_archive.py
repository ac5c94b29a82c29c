"""Archives that Python runs: the same bytes for the same members, readable sources, and a list of hashes."""

import io
import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_bundle import run_isolated
from trihybrid.export.archive import SHEBANG, pack
from trihybrid.export.entry import MEMBERS, check_members


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}\.py", fullmatch=True), st.text(max_size=50), max_size=5))
def test_an_archive_depends_on_its_texts_alone(texts: dict[str, str]) -> None:
    content = pack(texts)
    assert content == pack(dict(reversed(texts.items())))
    assert content.startswith(SHEBANG)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        hashes = json.loads(archive.read(MEMBERS))
        assert {name: archive.read(name).decode() for name in hashes} == texts
        assert archive.testzip() is None and len(archive.namelist()) == len(texts) + 1


def test_sources_inside_an_archive_can_be_read_while_they_load(tmp_path: Path) -> None:
    """A Triton kernel is compiled from its source, which is asked for when the decorator runs."""
    kernels = (
        "import inspect\n"
        "def jit(function):\n    function.source = inspect.getsource(function)\n    return function\n"
        "@jit\ndef kernel(x):\n    return x + 1\n"
    )
    main = "from inner.kernels import kernel\nprint(kernel.source, end='')\n"
    (tmp_path / "train_gpt.py").write_bytes(
        pack({"__main__.py": main, "inner/__init__.py": "", "inner/kernels.py": kernels})
    )
    done = run_isolated(tmp_path / "train_gpt.py", tmp_path)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "@jit\ndef kernel(x):\n    return x + 1\n"


def test_a_changed_member_is_named(tmp_path: Path) -> None:
    program = tmp_path / "train_gpt.py"
    program.write_bytes(pack({"__main__.py": "", "a.py": "x = 1\n"}))
    check_members(program)
    with zipfile.ZipFile(program) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for change in ({"a.py": b"x = 2\n"}, {"b.py": b""}):
        with zipfile.ZipFile(program, "w") as archive:
            for name, content in (members | change).items():
                archive.writestr(name, content)
        with pytest.raises(ValueError, match=rf"{next(iter(change))} is not what {MEMBERS} says"):
            check_members(program)
