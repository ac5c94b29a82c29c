"""Artifacts: exact round trips, an account that adds up, the same bytes twice, and a reader that believes nothing."""

import hashlib
import json
import logging
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_by_definition import decode_simply
from artifact_mutants import with_text

from trihybrid.compress import container
from trihybrid.compress.artifact import encode_artifact, read_artifact, write_artifact
from trihybrid.compress.ledger import HEADER, Ledger, ledger_rows, make_ledger, parse_ledger
from trihybrid.compress.tensors import PlainTensor, QuantisedTensor

CODECS = ("smallest", "packed", "rans", "stored", "zlib", "lzma", "zstd", "brotli")
CONFIGURATION = {"format": 1, "section": {"hidden_size": 24, "ratio": 3.0}, "legend": ["T", None, True]}


def tensors() -> list[QuantisedTensor | PlainTensor]:
    """One of each kind, dtype and number of bits, a scalar, and a matrix of zeros."""
    generator = torch.Generator().manual_seed(0)

    def quantised(name: str, rows: int, columns: int, bits: int) -> QuantisedTensor:
        half = 2 ** (bits - 1)
        values = (torch.randn(rows, columns, generator=generator) * half / 4).round().clamp(-half, half - 1)
        scales = (torch.rand(rows, generator=generator) * 0.01 + 0.01).half()
        return QuantisedTensor(name, values.to(torch.int8), scales, bits)

    return [
        *(quantised(f"matrix{bits}", 30 + bits, 64, bits) for bits in range(2, 9)),
        QuantisedTensor("zero", torch.zeros(5, 7, dtype=torch.int8), torch.zeros(5).half(), 6),
        PlainTensor("vector", torch.randn(100, generator=generator).half()),
        PlainTensor("decay", torch.randn(3, 4, 5, generator=generator) * 1e6),
        PlainTensor("scalar", torch.tensor(-0.1)),
    ]


def values(tensor: QuantisedTensor | PlainTensor) -> torch.Tensor:
    return tensor.dequantised() if isinstance(tensor, QuantisedTensor) else tensor.values.float()


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_read_is_what_was_written_to_the_bit(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "model.artifact"
    ledger = write_artifact(path, tensors(), CONFIGURATION, 1234, codec)
    artifact = read_artifact(path)
    assert artifact.configuration == CONFIGURATION
    assert artifact.ledger == ledger == encode_artifact(tensors(), CONFIGURATION, 1234, codec).ledger
    assert list(artifact.tensors) == [tensor.name for tensor in tensors()]
    for tensor in tensors():
        found = artifact.tensors[tensor.name]
        assert found.dtype == torch.float32
        assert found.shape == values(tensor).shape
        assert found.numpy().tobytes() == values(tensor).numpy().tobytes()
    simple = decode_simply(path.read_bytes())[1]
    assert all(simple[name].tobytes() == found.numpy().tobytes() for name, found in artifact.tensors.items())


@pytest.mark.parametrize("codec", CODECS)
def test_the_ledger_accounts_for_every_byte(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "model.artifact"
    ledger = write_artifact(path, tensors(), CONFIGURATION, 1234, codec)
    size = path.stat().st_size
    parts = [part for entry in ledger.tensors for part in entry.parts]
    assert ledger.header_bytes + ledger.ledger_bytes + sum(part.bytes for part in parts) == size
    assert (ledger.file_bytes, ledger.total_bytes) == (size, size + 1234)
    content = path.read_bytes()
    assert content[8:16] == struct.pack("<II", 1, ledger.ledger_bytes)
    text = content[HEADER.size : HEADER.size + ledger.ledger_bytes]
    assert hashlib.sha256(text).digest() == content[16:48]
    assert json.loads(text) == ledger.model_dump()
    rows = ledger_rows(ledger)
    assert sum(row.bytes for row in rows[:-1]) == rows[-1].bytes == ledger.total_bytes
    assert rows[-1].elements == sum(values(tensor).numel() for tensor in tensors())


@pytest.mark.parametrize("code_bytes", [0, 9, 98, 983, 9_832, 98_310, 999_000, 2**32])
def test_the_ledger_knows_its_own_length_at_every_number_of_digits(code_bytes: int) -> None:
    for padding in range(24):
        ledger, head = make_ledger([], {"padding": "x" * (700 + padding)}, code_bytes)
        assert ledger.ledger_bytes == len(head) - HEADER.size
        assert ledger.total_bytes == len(head) + code_bytes


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_artifact(tmp_path / name, tensors(), CONFIGURATION, 0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_smallest_is_no_larger_than_any_codec() -> None:
    smallest = encode_artifact(tensors(), {}, 0).ledger
    for codec in CODECS[1:]:
        single = encode_artifact(tensors(), {}, 0, codec).ledger
        for one, other in zip(smallest.tensors, single.tensors, strict=True):
            assert all(a.bytes <= b.bytes for a, b in zip(one.parts, other.parts, strict=True))


def test_smallest_says_what_it_did_not_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(container, "missing_codecs", lambda: {"brotli": "not installed"})
    with caplog.at_level(logging.WARNING):
        ledger = encode_artifact(tensors(), {}, 0).ledger
    assert caplog.messages == ["brotli is not tried: not installed"]
    assert all(part.codec != "brotli" for entry in ledger.tensors for part in entry.parts)


def test_rows_are_grouped_by_role() -> None:
    ledger = encode_artifact(tensors(), {}, 10, "packed").ledger
    rows = {row.label: row for row in ledger_rows(ledger, {"matrix6": "matrix", "zero": "matrix"})}
    assert rows["matrix int6"].tensors == 2
    assert rows["matrix int6"].elements == 36 * 64 + 35
    assert rows["matrix int6"].bits_per_weight == pytest.approx(6, abs=0.01)
    assert rows["int5"].bits_per_weight == 5
    assert rows["code"].bytes == 10
    assert rows["code"].bits_per_weight is None


def test_a_failed_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.artifact"
    write_artifact(path, tensors(), {}, 0, "stored")
    old = path.read_bytes()
    with pytest.raises(ValueError, match="twice"):
        write_artifact(path, [*tensors(), *tensors()], {}, 0, "stored")
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["model.artifact"]


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else 0


@pytest.mark.parametrize(
    ("configuration", "name", "code_bytes", "codec", "message"),
    [
        ({"a": float("nan")}, "x", 0, "rans", "not JSON|Out of range float"),
        ({"a": {1, 2}}, "x", 0, "rans", "not JSON"),
        (nested(16), "x", 0, "rans", "deeper than 16"),
        ({"a": "x" * 2**20}, "x", 0, "rans", "at most 1048576"),
        ({}, "with space", 0, "rans", "1 to 255 printable"),
        ({}, "", 0, "rans", "1 to 255 printable"),
        ({}, "x" * 256, 0, "rans", "1 to 255 printable"),
        ({}, "x", -1, "rans", "code_bytes"),
        ({}, "x", 0, "gzip", 'codec is "gzip", expected smallest or one of packed'),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, configuration: dict[str, Any], name: str, code_bytes: int, codec: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_artifact(tmp_path / "a", [PlainTensor(name, torch.ones(3))], configuration, code_bytes, codec)
    assert list(tmp_path.iterdir()) == []


def test_the_deepest_configuration_comes_back(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", [], nested(15), 0)
    assert read_artifact(tmp_path / "a").configuration == nested(15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantisedTensor("w", torch.zeros(2, 3), torch.ones(2).half(), 6), "w: integers are float32"),
        (
            lambda: QuantisedTensor("w", torch.zeros(6).char(), torch.ones(6).half(), 6),
            "expected an int8 matrix",
        ),
        (lambda: QuantisedTensor("w", torch.zeros(2, 3).char(), torch.ones(3).half(), 6), r"float16 \[2\]"),
        (lambda: QuantisedTensor("w", torch.zeros(2, 3).char(), torch.ones(2), 6), "scales are float32"),
        (
            lambda: QuantisedTensor("w", torch.full((2, 3), 32).char(), torch.ones(2).half(), 6),
            r"hold -32\.\.31",
        ),
        (lambda: QuantisedTensor("w", torch.zeros(2, 3).char(), torch.ones(2).half(), 9), "bits is 9"),
        (lambda: QuantisedTensor("w", torch.zeros(2, 3).char(), -torch.ones(2).half(), 6), "negative"),
        (
            lambda: QuantisedTensor("w", torch.zeros(1, 3).char(), torch.tensor([torch.inf]).half(), 6),
            "not finite",
        ),
        (lambda: PlainTensor("w", torch.zeros(3, dtype=torch.float64)), "float64"),
        (lambda: PlainTensor("w", torch.zeros(0)), "not empty"),
        (lambda: PlainTensor("w", torch.tensor([1.0, torch.nan])), "diverged"),
    ],
)
def test_tensors_that_cannot_be_stored(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def small_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """(ledger, parts) of a small artifact at `path`."""
    write_artifact(path, [*tensors()[4:5], *tensors()[-3:]], {"section": {}}, 5, "stored")
    content = path.read_bytes()
    length = struct.unpack_from("<I", content, 12)[0]
    return json.loads(content[48 : 48 + length]), content[48 + length :]


def rewritten(ledger: dict[str, Any], content: bytes) -> bytes:
    return with_text(json.dumps(ledger, sort_keys=True, separators=(",", ":")).encode(), content)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("tensors", 0, "shape"), [35, 63], "decode to|more than the expected"),
        (("tensors", 0, "shape"), [2**20, 2**20], "more than 268435456 elements"),
        (("tensors", 0, "shape"), [36, 64, 1], r"tensors\.0\.quantised\.shape"),
        (("tensors", 0, "bits"), 5, "range of 5 bits"),
        (("tensors", 0, "bits"), 6.0, "valid integer"),
        (("tensors", 0, "bits"), True, "valid integer"),
        (("tensors", 0, "dtype"), "float16", "dtype"),
        (("tensors", 0, "kind"), "pickle", r"tensors\.0"),
        (("tensors", 0, "values", "codec"), "gzip", "codec"),
        (("tensors", 0, "values", "codec"), "rans", 'tensor "matrix6": rans'),
        (("tensors", 0, "values", "offset"), 1, "at offset 1, expected 0"),
        (("tensors", 0, "values", "bytes"), 2303, "at offset 2304, expected 2303"),
        (("tensors", 0, "values", "sha256"), "0" * 64, 'tensor "matrix6": the sha256 is wrong'),
        (("tensors", 0, "extra"), 1, "Extra inputs are not permitted"),
        (("tensors", 1, "name"), "matrix6", 'tensor "matrix6" is there twice'),
        (("tensors", 2, "dtype"), "float16", "decode to"),
        (("tensors",), [], "tensor_bytes is"),
        (("code_bytes",), 6, "total_bytes is"),
        (("code_bytes",), -1, "code_bytes"),
        (("configuration",), [], "configuration"),
        (("format",), 2, "format"),
        (("format",), 1.0, "format"),
        (("format",), True, "format"),
        (("header_bytes",), 48.0, "header_bytes"),
        (("header_bytes",), 47, "header_bytes"),
        (("secret",), 1, "secret"),
    ],
)
def test_a_ledger_that_lies_is_refused(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, message: str
) -> None:
    file = tmp_path / "model.artifact"
    ledger, content = small_file(file)
    holder: Any = ledger
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    # Whether the change makes the ledger longer is not what is tested here.
    for _ in range(3):
        length = len(json.dumps(ledger, sort_keys=True, separators=(",", ":")))
        ledger["ledger_bytes"] = length
        ledger["file_bytes"] = 48 + length + len(content)
        ledger["total_bytes"] = ledger["file_bytes"] + 5
    file.write_bytes(rewritten(ledger, content))
    with pytest.raises(ValueError, match=message) as refused:
        read_artifact(file)
    assert str(refused.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "not an artifact"),
        (lambda data: data[:47], "not an artifact"),
        (lambda data: b"X" + data[1:], "not an artifact"),
        (lambda data: data[:8] + b"\2" + data[9:], "format 2"),
        (lambda data: data[:12] + b"\xff\xff\xff\xff" + data[16:], "4294967295 bytes; the file is cut short"),
        (lambda data: data[:20] + b"\0\0" + data[22:], "sha256 of the ledger is wrong"),
        (lambda data: data[:-1], "bytes, its ledger accounts for"),
        (lambda data: data + b"\0", "bytes, its ledger accounts for"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), 'tensor "scalar": the sha256 is wrong'),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    file = tmp_path / "model.artifact"
    small_file(file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as refused:
        read_artifact(file)
    assert str(refused.value).startswith(f"{file}: ")


def test_no_file_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_artifact(tmp_path / "nothing")
    with pytest.raises(ValueError, match="directory"):
        read_artifact(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a":NaN}', "NaN is not a number"),
        (b'{"a":1e999}', "not JSON"),
        (b'{"a":1,"a":1}', "canonical"),
        (b'{"a": 1}', "canonical"),
        (b'{"b":1,"a":1}', "canonical"),
        (b'{"a":"\xc3\xa9"}', "not JSON"),
        (b"[" * 17 + b"]" * 17, "deeper than 16"),
        (b"[" * 10**6, "deeper than 16"),
        (b"9" * 10**5, "not JSON"),
        (b"[]", "valid dictionary"),
        (b"{}", "format: Field required"),
        (b" " * (2**20 + 1), "at most 1048576"),
    ],
)
def test_a_ledger_that_is_not_one_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_ledger(text)


def test_brackets_in_strings_are_not_depth() -> None:
    ledger, _ = make_ledger([], {"a": "[" * 99 + '"' + "{" * 99 + "\\"}, 0)
    assert isinstance(ledger, Ledger)


def test_the_limit_on_elements_is_the_callers(tmp_path: Path) -> None:
    file = tmp_path / "model.artifact"
    small_file(file)
    count = 36 * 64 + 100 + 60 + 1
    assert len(read_artifact(file, limit_elements=count).tensors) == 4
    with pytest.raises(ValueError, match=f'with tensor "scalar" there are more than {count - 1} elements'):
        read_artifact(file, limit_elements=count - 1)


def test_the_reader_comes_without_torch() -> None:
    """What keeps a hostile file inside 256 MiB, and lets other programs read artifacts."""
    code = "import sys, trihybrid.compress.container; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
