"""Ranges of bytes against safetensors' own reader."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trihybrid.storage.tensor_files import (
    DTYPES,
    INDEX,
    TensorRange,
    read_header,
    read_headers,
    weight_files,
)


def some_tensors() -> dict[str, Tensor]:
    """One of every dtype, a scalar and an empty one."""
    tensors = {
        name: (torch.arange(15).view(5, 3) % 2 if dtype == torch.bool else torch.arange(15).view(5, 3)).to(
            dtype
        )
        for name, dtype in DTYPES.items()
    }
    return tensors | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}


def write(path: Path, header: dict, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_tensors_and_rows_are_those_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(some_tensors(), path, {"format": "pt"})
    found, wanted = read_header(path), load_file(path)
    assert found.keys() == wanted.keys()
    rows_N = torch.tensor([4, 0, 0, 2])
    for name, tensor in wanted.items():
        read = found[name].read()
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
        assert read.data_ptr() % 16 == 0 or read.numel() == 0
        if tensor.dim() == 2 and len(tensor):
            assert torch.equal(found[name].rows(rows_N), tensor[rows_N]), name


def test_rows_read_those_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"table": torch.randn(1000, 8)}, path)
    lengths: list[int] = []
    plain = TensorRange._read

    def read(self: TensorRange, offset: int, length: int) -> Tensor:
        lengths.append(length)
        return plain(self, offset, length)

    monkeypatch.setattr(TensorRange, "_read", read)
    read_header(path)["table"].rows(torch.tensor([7, 900, 7]))
    assert lengths == [32, 32]


GOOD = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [5]}, "not safetensors"),
        ({"shape": [-4]}, "not safetensors"),
        ({"shape": 4}, "not safetensors"),
        ({"data_offsets": [0]}, "not safetensors"),
        ({"data_offsets": [4, 0]}, "not safetensors"),
        ({"data_offsets": [2, 6]}, "its tensors do not join"),
        ({"dtype": "F32", "shape": [1]}, None),
        ({"dtype": "F4", "shape": [8]}, None),
        ({"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "bytes, its header describes"),
    ],
)
def test_headers_that_do_not_add_up_are_refused(tmp_path: Path, change: dict, message: str | None) -> None:
    path = write(tmp_path / "f", {"a": GOOD["a"] | change}, b"1234")
    if message is None:
        assert read_header(path)["a"].length == 4
    else:
        with pytest.raises(ValueError, match=message):
            read_header(path)


def test_overlaps_are_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "f", GOOD | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}, b"123456"
    )
    with pytest.raises(ValueError, match="its tensors do not join"):
        read_header(path)


def test_a_dtype_that_is_not_known_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "f", {"a": GOOD["a"] | {"dtype": "F4", "shape": [8]}}, b"1234")
    with pytest.raises(ValueError, match=r"tensors of dtype F4 are not read; known: F64, F32"):
        read_header(path)["a"].read()


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "f", GOOD, b"1234")
    place = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"f: ends at byte {place.start + 2}; it became shorter"):
        place.read()


def test_an_index_chooses_the_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == [
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
    ]
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert read_headers(weight_files(tmp_path)).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not an index of shards"),
        ("[]", "not an index of shards"),
        ('{"weight_map": [1]}', "not an index of shards"),
        ('{"weight_map": {"a": 3}}', "not an index of shards"),
        ('{"weight_map": {}}', "names no shard"),
        ('{"weight_map": {"a": "z.safetensors"}}', r"names z\.safetensors, not in the folder"),
        ('{"weight_map": {"a": "../out.safetensors"}}', r"names out\.safetensors, not in the folder"),
    ],
)
def test_indices_that_name_no_files_of_the_folder_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "out.safetensors")
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=message):
        weight_files(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"same": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors: holds same, which a\.safetensors holds too"):
        read_headers(weight_files(tmp_path))
