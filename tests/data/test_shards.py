"""Shards: the stream comes back exactly, and no damage goes unseen."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.data import shards as module
from trihybrid.data.shards import TokenShards, write_shards, write_stream


def write(folder: Path, documents: list[list[int]], vocab_size: int = 260, per_shard: int = 7) -> TokenShards:
    return write_shards(
        folder, documents, vocab_size, 2, text_bytes=11, tokenizer_hash="t", tokens_per_shard=per_shard
    )


def change_manifest(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | fields))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    documents=st.lists(st.lists(st.integers(3, 259), min_size=1, max_size=20), min_size=1, max_size=10),
    per_shard=st.integers(1, 40),
    data=st.data(),
)
def test_every_slice_of_the_stream(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], per_shard: int, data: st.DataObject
) -> None:
    stream = [token for document in documents for token in (2, *document)]
    shards = write(tmp_path_factory.mktemp("shards"), documents, per_shard=per_shard)
    assert len(shards) == len(stream)
    assert len(shards.manifest.shards) == -(-len(stream) // per_shard)
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert shards.tokens(start, stop).tolist() == stream[start:stop]
    assert TokenShards(shards.folder).tokens(0, len(stream)).tolist() == stream


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "largest"),
    [(65536, "<u2", 65535), (65537, "<u4", 65536), (262144, "<u4", 262143)],
)
def test_width_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str, largest: int) -> None:
    shards = write(tmp_path, [[largest, 3]], vocab_size)
    assert shards.tokens(0, 3).tolist() == [2, largest, 3]
    assert (tmp_path / "00000.bin").read_bytes() == np.array([2, largest, 3], dtype=dtype).tobytes()


def test_what_the_manifest_says(tmp_path: Path) -> None:
    shards = write(tmp_path, [[5] * 9, [6]])
    assert (shards.vocab_size, shards.bos_id, shards.text_bytes) == (260, 2, 11)
    assert shards.manifest.documents == 2
    assert [(entry.file, entry.tokens, entry.bytes) for entry in shards.manifest.shards] == [
        ("00000.bin", 7, 14),
        ("00001.bin", 5, 10),
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.bin", "00001.bin", "manifest.json"]


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [[5, 6]]).hash
    assert write(tmp_path / "b", [[5, 6]]).hash == first == TokenShards(tmp_path / "a").hash
    assert write(tmp_path / "b", [[6, 5]]).hash != first


def test_rewriting_leaves_no_stale_shard(tmp_path: Path) -> None:
    write(tmp_path, [[5] * 30])
    other = tmp_path / "fineweb_train_000000.bin"
    other.write_bytes(b"not ours")
    write(tmp_path, [[5]])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.bin", other.name, "manifest.json"]


def test_an_interrupted_writing_leaves_no_manifest(tmp_path: Path) -> None:
    write(tmp_path, [[5] * 30])
    with pytest.raises(ValueError, match=r"document 1 has ids 5 to 260, allowed 0 to 259"):
        write(tmp_path, [[5] * 30, [5, 260]])
    with pytest.raises(ValueError, match="no finished shards"):
        TokenShards(tmp_path)


def test_truncation_is_seen_by_size_alone(tmp_path: Path) -> None:
    write(tmp_path, [[5] * 9])
    file = tmp_path / "00001.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"00001\.bin: expected 6 bytes, found 4; delete the folder"):
        TokenShards(tmp_path, verify=False)
    file.unlink()
    with pytest.raises(ValueError, match=r"00001\.bin: expected 6 bytes, found none"):
        TokenShards(tmp_path)


@pytest.mark.parametrize("bit", [0, 37, 111])
def test_a_flipped_bit_is_seen_by_hash(tmp_path: Path, bit: int) -> None:
    write(tmp_path, [[5] * 9])
    file = tmp_path / "00000.bin"
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"00000\.bin: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        TokenShards(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "expected format 1, found 2"),
        ({"dtype": "int64"}, "dtype is 'int64'"),
        ({"more": 1}, "more is 1"),
        ({"tokens": 12}, "tokens is 12"),
        ({"dtype": "uint32"}, "not its tokens times 4"),
        ({"shards": []}, "shards is"),
    ],
)
def test_a_bad_manifest_is_refused_in_one_line(tmp_path: Path, fields: dict, message: str) -> None:
    write(tmp_path, [[5] * 9])
    change_manifest(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        TokenShards(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../00000.bin", "a/00000.bin", "/00000.bin", "..\\00000.bin", "00000.bin\n"]
)
def test_a_path_in_the_manifest_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "inside"
    write(folder, [[5]])
    (tmp_path / "00000.bin").write_bytes((folder / "00000.bin").read_bytes())
    entry = json.loads((folder / "manifest.json").read_text())["shards"][0]
    change_manifest(folder, shards=[entry | {"file": name}])
    with pytest.raises(ValueError, match=r"shards\.0\.file is"):
        TokenShards(folder)


def test_a_manifest_that_is_not_json(tmp_path: Path) -> None:
    write(tmp_path, [[5]])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        TokenShards(tmp_path)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "no documents"),
        ([[5], []], "document 1 has no tokens"),
        ([[-1]], "ids -1 to -1"),
        ([[5, 2]], "holds BOS"),
    ],
)
def test_bad_documents_are_refused(tmp_path: Path, documents: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, documents)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 4)])
def test_tokens_outside_the_stream_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not inside the stream of 3 tokens"):
        write(tmp_path, [[5, 6]]).tokens(start, stop)


def test_bad_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bos_id"):
        write(tmp_path, [[1]], vocab_size=2)
    with pytest.raises(ValueError, match="tokens_per_shard is 0"):
        write(tmp_path, [[5]], per_shard=0)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    documents=st.lists(st.lists(st.integers(3, 259), min_size=1, max_size=20), min_size=1, max_size=10),
    per_shard=st.integers(1, 40),
    block=st.integers(1, 30),
    data=st.data(),
)
def test_rows_and_documents_of_the_stream(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    per_shard: int,
    block: int,
    data: st.DataObject,
) -> None:
    shards = write(tmp_path_factory.mktemp("shards"), documents, per_shard=per_shard)
    length = data.draw(st.integers(1, len(shards)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(shards) - length), max_size=5)), dtype=np.int64)
    rows = shards.rows(starts, length)
    assert rows.shape == (starts.size, length)
    for row, start in zip(rows, starts.tolist(), strict=True):
        assert row.tolist() == shards.tokens(start, start + length).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        assert [document.tolist() for document in shards.documents()] == [[2, *ids] for ids in documents]


@pytest.mark.parametrize(("starts", "length"), [([-1], 2), ([2], 2), ([0], 4), ([0], 0)])
def test_rows_outside_the_stream_are_refused(tmp_path: Path, starts: list[int], length: int) -> None:
    with pytest.raises(ValueError, match="leave the stream of 3 tokens"):
        write(tmp_path, [[5, 6]]).rows(np.array(starts), length)


def test_a_stream_is_written_as_it_is(tmp_path: Path) -> None:
    arrays = iter([np.array([7, 2, 2]), np.array([], dtype=np.int64), np.array([9], dtype=np.uint16)])
    counted = []
    shards = write_stream(
        tmp_path, arrays, 260, 2, text_bytes=lambda: len(counted) + 5, tokenizer_hash="t", tokens_per_shard=2
    )
    assert shards.tokens(0, 4).tolist() == [7, 2, 2, 9]
    assert (shards.manifest.documents, shards.text_bytes) == (2, 5)
    assert [document.tolist() for document in shards.documents()] == [[2], [2, 9]]


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([3, 4], r"2 tokens, 0 of them BOS \(2\)"),
        ([2], "1 tokens, 1 of them BOS"),
        ([2, 260], "ids 2 to 260, allowed 0 to 259"),
        ([2, -1], "ids -1 to 2"),
    ],
)
def test_a_bad_stream_is_refused(tmp_path: Path, stream: list[int], message: str) -> None:
    write(tmp_path, [[5]])
    with pytest.raises(ValueError, match=message):
        write_stream(tmp_path, [np.array(stream)], 260, 2, text_bytes=lambda: 0, tokenizer_hash="")
    assert not (tmp_path / "manifest.json").exists()
