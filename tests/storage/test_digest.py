import hashlib
from pathlib import Path

import pytest

from trihybrid.storage.digest import PIECE, check_entry, file_entry, matches


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 99, 100])
def test_a_file_of_one_piece_has_its_own_sha256(tmp_path: Path, pieces: int, size: int) -> None:
    content = bytes(range(200))[:size]
    (tmp_path / "file").write_bytes(content)
    assert file_entry(tmp_path / "file") == {"bytes": size, "sha256": sha256(content)}


@pytest.mark.parametrize("size", [101, 200, 1_050])
def test_a_longer_file_has_the_sha256_of_those_of_its_pieces(tmp_path: Path, pieces: int, size: int) -> None:
    content = bytes(place * 7 % 251 for place in range(size))
    (tmp_path / "file").write_bytes(content)
    digests = [hashlib.sha256(content[at : at + pieces]).digest() for at in range(0, size, pieces)]
    assert file_entry(tmp_path / "file") == {"bytes": size, "sha256_of_pieces": sha256(b"".join(digests))}


def test_pieces_are_16_mib_and_all_of_a_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytearray(2 * PIECE + 5)
    path.write_bytes(content)
    wanted = file_entry(path)
    assert PIECE == 16 << 20
    first = hashlib.sha256(bytes(PIECE)).digest()
    assert wanted["sha256_of_pieces"] == sha256(first + first + hashlib.sha256(bytes(5)).digest())
    for place in (0, PIECE - 1, PIECE, 2 * PIECE + 4):
        content[place] ^= 1
        path.write_bytes(content)
        assert not matches(path, wanted)
        content[place] ^= 1
    path.write_bytes(content)
    assert matches(path, wanted)


def test_a_sha256_of_the_whole_of_a_long_file_is_read(tmp_path: Path, pieces: int) -> None:
    (tmp_path / "file").write_bytes(bytes(250))
    assert matches(tmp_path / "file", {"bytes": 250, "sha256": sha256(bytes(250))})
    assert not matches(tmp_path / "file", {"bytes": 250, "sha256": sha256(bytes(251))})


@pytest.mark.parametrize("found", [{}, {"bytes": 3}, {"bytes": "x", "sha256": ""}, {"sha256": "00"}, 3, None])
def test_what_is_no_entry_is_refused(found: object) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        check_entry(found)  # type: ignore[arg-type]
