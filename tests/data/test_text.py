"""Reading documents: what is read, and every way in which a source can be wrong."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.data.text import (
    assign_documents,
    deduplicate,
    read_documents,
    split_documents,
    stream_documents,
)


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes("\ufeffsecond\r\n".encode())
    lines = [json.dumps({"text": "first \u2028 line", "more": 1}, ensure_ascii=False), "", '{"text": "next"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "c.md").write_text("not read")
    assert read_documents(tmp_path) == ["first \u2028 line", "next", "second\r\n"]
    assert read_documents(tmp_path / "b" / "one.txt") == ["second\r\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"  \n", r"x\.txt is empty text"),
        ("x.txt", b"ab\xffc", r"x\.txt is not UTF-8: byte 0xff at offset 2"),
        ("x.md", b"text", "neither a folder nor"),
        ("x.jsonl", b'{"text": "a"}\n{"text"\n', r"x\.jsonl:2 is not JSON"),
        ("x.jsonl", b"[" * 100_000, r"x\.jsonl:1 is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n\n{"title": "b"}\n', r'x\.jsonl:3 has no string "text"'),
        ("x.jsonl", b"[1]\n", r'x\.jsonl:1 has no string "text"'),
        ("x.jsonl", b'{"text": " "}\n', r'x\.jsonl:1 has an empty "text"'),
        ("x.jsonl", b'{"text": "a\\ud800"}\n', r"x\.jsonl:1 has half a surrogate pair at character 1"),
        ("x.jsonl", b"\n", "holds no text"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_documents(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_files_read_as_plain_ones(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    lines = '\ufeff{"text": "one \u2028"}\n\n{"text": "two"}'.encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(lines))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress(b"three\r\nfour"))
    (tmp_path / f"c.md{suffix}").write_bytes(compress(b"not read"))
    assert read_documents(tmp_path) == ["one \u2028", "two", "three\r\nfour"]
    content = compress(lines * 100)
    for damaged in (content[: len(content) // 2], b"plain text"):
        (tmp_path / f"bad.jsonl{suffix}").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"bad\.jsonl\.(xz|gz) is damaged or not what its name says"):
            read_documents(tmp_path / f"bad.jsonl{suffix}")


def test_documents_come_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text"')
    documents = stream_documents(tmp_path / "a.jsonl")
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(ValueError, match=r"a\.jsonl:3 is not JSON"):
        next(documents)
    with pytest.raises(ValueError, match="does not exist"):
        stream_documents(tmp_path / "nothing")  # before the first is asked for


def test_the_offset_of_a_bad_byte_counts_from_the_head_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}')
    with pytest.raises(ValueError, match="byte 0xff at offset 26"):
        read_documents(tmp_path / "a.jsonl")


def test_sides_are_those_of_the_split() -> None:
    documents = ["a", "b", "a", "c", "d", "b", "e"]
    sides = assign_documents(iter(documents), 0.4, seed=3)
    assert [side for side, document in zip(sides, documents, strict=True)][2] == sides[5] == 0
    train, validation = split_documents(documents, 0.4, seed=3)
    assert [document for side, document in zip(sides, documents, strict=True) if side == 1] == train
    assert [document for side, document in zip(sides, documents, strict=True) if side == 2] == validation
    assert len(validation) == 2


def test_a_missing_path_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_documents(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(tmp_path)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    documents=st.lists(st.sampled_from("abcdefghijklmnop"), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_split_loses_nothing_and_shares_nothing(documents: list[str], fraction: float, seed: int) -> None:
    distinct = deduplicate(documents)
    if len(distinct) < 2:
        with pytest.raises(ValueError, match="distinct"):
            split_documents(documents, fraction, seed)
        return
    train, validation = split_documents(documents, fraction, seed)
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(distinct)
    assert abs(len(validation) - fraction * len(distinct)) <= 1
    assert (train, validation) == split_documents(documents, fraction, seed)


def test_the_seed_chooses_the_split_and_the_order_stays() -> None:
    documents = [f"{number:03d}" for number in range(100)]
    splits = {tuple(split_documents(documents, 0.1, seed)[1]) for seed in range(5)}
    assert len(splits) == 5
    assert all(len(split) == 10 and list(split) == sorted(split) for split in splits)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_fraction_that_leaves_a_side_empty_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="validation_fraction"):
        split_documents(["a", "b"], fraction, 0)
