"""Files that are written front to back, read by safetensors."""

import errno
import logging
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trihybrid.storage import digest, piece_writer
from trihybrid.storage.digest import file_entry
from trihybrid.storage.tensor_files import DTYPES, read_header
from trihybrid.storage.tensor_writer import TensorShape, TensorWriter, file_bytes


def some_tensors() -> dict[str, Tensor]:
    """Sizes below, at and above a piece of 100 bytes, of every dtype."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{name}.{count}": torch.randint(0, 2, (count, 3), generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        for count in (0, 1, 25, 90)
    }
    return tensors | {"scalar": torch.tensor(2.5)}


def shapes(tensors: dict[str, Tensor]) -> dict[str, TensorShape]:
    return {name: TensorShape.of(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path: Path, tensors: dict[str, Tensor]) -> TensorWriter:
    with TensorWriter(path, shapes(tensors)) as file:
        for name, tensor in tensors.items():
            file.put(name, tensor)
    return file


@pytest.mark.parametrize("copied", [False, True])
def test_the_file_is_what_safetensors_reads(tmp_path: Path, pieces: int, copied: bool) -> None:
    tensors = some_tensors()
    path = tmp_path / "out.safetensors"
    wanted = shapes(tensors)
    if copied:
        save_file(tensors, tmp_path / "in.safetensors")
        ranges = read_header(tmp_path / "in.safetensors")
        assert {name: TensorShape.like(ranges[name]) for name in tensors} == wanted
    with TensorWriter(path, wanted) as file:
        for name, tensor in tensors.items():
            if copied:
                file.copy(name, ranges[name])
            else:
                file.put(name, tensor)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert path.stat().st_size == file_bytes(wanted)
    assert file.entry == file_entry(path) and "sha256_of_pieces" in file.entry
    # Its own reader agrees, and nothing begins at an odd place in the file.
    assert all(place.start % 8 == 0 for name, place in read_header(path).items() if name.startswith("F64"))


@pytest.mark.parametrize("count", [0, 1])
def test_short_files(tmp_path: Path, count: int) -> None:
    tensors = {str(i): torch.tensor([1.0]) for i in range(count)}
    file = write(tmp_path / "f", tensors)
    assert load_file(tmp_path / "f").keys() == tensors.keys()
    assert file.entry == file_entry(tmp_path / "f")


def test_a_tensor_that_is_not_contiguous(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6).T
    with TensorWriter(tmp_path / "f", shapes({"a": tensor})) as file:
        file.put("a", tensor)
    assert torch.equal(load_file(tmp_path / "f")["a"], tensor)


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        TensorWriter(tmp_path / "f", {})
    assert (tmp_path / "f").read_bytes() == b"mine"


@pytest.mark.parametrize("room", [0, 300, 2_000, 5_000])
def test_a_full_disk_is_an_error_wherever_it_comes(
    tmp_path: Path, pieces: int, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Also where a part of a piece still fits, and for a piece that is written while the next ones are filled."""
    left, lock = [room], threading.Lock()
    plain = os.pwrite

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        with lock:
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = plain(handle, data[: left[0]], offset)
            left[0] -= count
            return count

    monkeypatch.setattr(os, "pwrite", pwrite)
    handles, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    tensors = {str(i): torch.zeros(1000) for i in range(5)}
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f", tensors)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (handles, threads)


def test_a_disk_that_takes_nothing_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f", {"a": torch.zeros(1)})


@pytest.fixture
def sectors(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces of two sectors, which may go past the page cache."""
    for module in (digest, piece_writer):
        monkeypatch.setattr(module, "PIECE", 2 * piece_writer.SECTOR)
    return 2 * piece_writer.SECTOR


@pytest.mark.parametrize("part", [False, True])
def test_whole_pieces_go_past_the_page_cache_and_the_rest_through_it(
    tmp_path: Path, sectors: int, monkeypatch: pytest.MonkeyPatch, part: bool
) -> None:
    """Also where the disk takes a part of a piece, whole sectors of it or not."""
    direct: set[int] = set()
    written: list[tuple[bool, int, int]] = []
    plain_open, plain_pwrite = piece_writer._open_direct, os.pwrite

    def open_direct(path: Path) -> int | None:
        handle = plain_open(path)
        assert handle is not None, "the tests' own disk takes direct writes"
        direct.add(handle)
        return handle

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        if part and len(data) > 5_000:
            data = data[: 4096 if offset % 3 else 5_000] if handle not in direct else data[:4096]
        count = plain_pwrite(handle, data, offset)
        written.append((handle in direct, count, offset))
        return count

    monkeypatch.setattr(piece_writer, "_open_direct", open_direct)
    monkeypatch.setattr(os, "pwrite", pwrite)
    tensors = {str(i): torch.randn(1_500 + i) for i in range(20)}
    file = write(tmp_path / "f", tensors)
    assert all(torch.equal(load_file(tmp_path / "f")[name], tensor) for name, tensor in tensors.items())
    assert file.entry == file_entry(tmp_path / "f")
    whole = file_bytes(shapes(tensors)) // sectors * sectors
    assert sum(count for past, count, _ in written if past) == whole
    assert all(count % 4096 == offset % 4096 == 0 for past, count, offset in written if past)


def test_a_file_system_without_direct_writes_is_written_through_the_cache(
    tmp_path: Path, sectors: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = os.open

    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & piece_writer.DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    tensors = {str(i): torch.randn(1_500) for i in range(20)}
    with caplog.at_level(logging.INFO, logger="trihybrid"):
        file = write(tmp_path / "f", tensors)
    monkeypatch.undo()
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'f'}: written through the page cache; its file system takes no direct writes"
    ]
    assert all(torch.equal(load_file(tmp_path / "f")[name], tensor) for name, tensor in tensors.items())
    assert file.entry["bytes"] == (tmp_path / "f").stat().st_size


def test_writes_that_take_a_part_are_gone_on_with(
    tmp_path: Path, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: plain(handle, data[:37], offset))
    tensors = some_tensors()
    file = write(tmp_path / "f", tensors)
    assert file.entry == file_entry(tmp_path / "f")
    assert all(torch.equal(load_file(tmp_path / "f")[name], tensor) for name, tensor in tensors.items())
