"""The challenge's token files: round trips to the bit, and every kind of damage is named."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.data.challenge import challenge_files, export_challenge, import_challenge, read_challenge_file
from trihybrid.data.shards import TokenShards, write_shards
from trihybrid.data.tokens import Tokenizer

BYTES = Tokenizer.bytes()


def write_file(file: Path, tokens: list[int], magic: int = 20240520, version: int = 1) -> Path:
    """A file written by hand, from the description of the format alone."""
    words = [magic, version, len(tokens)] + [0] * 253
    header = b"".join(word.to_bytes(4, "little") for word in words)
    file.write_bytes(header + b"".join(token.to_bytes(2, "little") for token in tokens))
    return file


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    documents=st.lists(st.lists(st.integers(4, 259), max_size=9), min_size=1, max_size=6),
    per_file=st.integers(1, 30),
)
def test_a_round_trip_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], per_file: int
) -> None:
    folder = tmp_path_factory.mktemp("challenge")
    stream = [token for document in documents for token in (2, *document)] + [2, 5]
    for number, start in enumerate(range(0, len(stream), per_file)):
        write_file(folder / f"fineweb_train_{number:06d}.bin", stream[start : start + per_file])
    shards = import_challenge(folder, "train", folder / "ours", BYTES, "source")
    assert TokenShards(folder / "ours").tokens(0, len(shards)).tolist() == stream
    manifest = shards.manifest
    assert (manifest.documents, manifest.source_hash) == (len(documents) + 1, "source")
    assert manifest.text_bytes == sum(map(len, documents)) + 1
    files = export_challenge(shards, folder / "again", "train", per_file)
    assert [file.name for file in files] == [file.name for file in challenge_files(folder, "train")]
    for file in files:
        assert file.read_bytes() == (folder / file.name).read_bytes()


def test_the_bytes_of_a_file_are_pinned(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "s", [[5, 6], [7]], 300, 2, text_bytes=3, tokenizer_hash="")
    (file,) = export_challenge(shards, tmp_path, "val")
    assert file.name == "fineweb_val_000000.bin"
    content = file.read_bytes()
    assert len(content) == 1024 + 10
    assert content[:12].hex() == "88d83401" + "01000000" + "05000000"
    assert content[1024:].hex() == "0200050006000200" + "0700"
    assert hashlib.sha256(content[12:1024]).digest() == hashlib.sha256(bytes(1012)).digest()


def test_splits_are_kept_apart(tmp_path: Path) -> None:
    write_file(tmp_path / "fineweb_train_000000.bin", [2, 5])
    write_file(tmp_path / "fineweb_val_000000.bin", [2, 6])
    (tmp_path / "fineweb_val_bytes_000000.bin").write_bytes(b"a sidecar")
    (tmp_path / "fineweb_val_x.bin").write_bytes(b"another")
    assert [file.name for file in challenge_files(tmp_path, "val")] == ["fineweb_val_000000.bin"]
    shards = import_challenge(tmp_path, "val", tmp_path / "ours", BYTES)
    assert shards.tokens(0, 2).tolist() == [2, 6]
    assert shards.manifest.tokenizer_hash == BYTES.hash


def test_a_stream_may_begin_inside_a_document(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    write_file(tmp_path / "fineweb_train_000004.bin", [8, 9, 2, 5])
    shards = import_challenge(tmp_path, "train", tmp_path / "ours", BYTES)
    assert [document.tolist() for document in shards.documents()] == [[2, 5]]
    assert "begins inside a document" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"magic": 20240521}, "expected magic 20240520 and version 1, found 20240521 and 1"),
        ({"version": 2}, "found 20240520 and 2"),
        ({"tokens": [2, 300]}, r"000000\.bin has id 300, the tokenizer 0 to 259"),
        ({"tokens": [1, 5]}, r"0 of them BOS \(2\)"),
        ({"tokens": []}, "the stream has 0 tokens"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, fields: dict, message: str) -> None:
    write_file(tmp_path / "fineweb_train_000000.bin", **({"tokens": [2, 5]} | fields))
    with pytest.raises(ValueError, match=message):
        import_challenge(tmp_path, "train", tmp_path / "ours", BYTES)
    assert not (tmp_path / "ours" / "manifest.json").exists()


@pytest.mark.parametrize("size", [0, 100, 1024, 1027, 1029])
def test_a_wrong_size_is_named(tmp_path: Path, size: int) -> None:
    file = write_file(tmp_path / "fineweb_train_000000.bin", [2, 5])
    file.write_bytes((file.read_bytes() + b"\0")[:size])
    with pytest.raises(
        ValueError, match=r"000000\.bin.*(fewer than its header|take 1028 bytes; the file has)"
    ):
        read_challenge_file(file)


def test_a_negative_count_is_refused(tmp_path: Path) -> None:
    file = write_file(tmp_path / "fineweb_train_000000.bin", [2, 5])
    content = bytearray(file.read_bytes())
    content[8:12] = (-1).to_bytes(4, "little", signed=True)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="says -1 tokens"):
        read_challenge_file(file)


def test_missing_and_existing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \*_train_\*\.bin"):
        import_challenge(tmp_path, "train", tmp_path / "ours", BYTES)
    with pytest.raises(ValueError, match="does not exist"):
        read_challenge_file(tmp_path / "x.bin")
    shards = write_shards(tmp_path / "s", [[5]], 300, 2, text_bytes=1, tokenizer_hash="")
    export_challenge(shards, tmp_path, "train")
    with pytest.raises(ValueError, match="is there already"):
        export_challenge(shards, tmp_path, "train")
    with pytest.raises(ValueError, match="tokens_per_file is 0"):
        export_challenge(shards, tmp_path, "val", 0)
    wide = write_shards(tmp_path / "w", [[5]], 65_537, 2, text_bytes=1, tokenizer_hash="")
    with pytest.raises(ValueError, match="vocab_size is 65537"):
        export_challenge(wide, tmp_path, "val")
