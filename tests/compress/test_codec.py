"""Every codec gives back what it got, produces no more than it may, and refuses all that is not exactly its own."""

import importlib
import sys
import tracemalloc
import types

import pytest
from artifact_mutants import BOMBS, bomb
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.compress.codec import CODECS, byte_codec, missing_codecs

COMPRESSING = [name for name in CODECS if name != "stored"]


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.binary(max_size=300), st.integers(1, 40))
def test_decoding_is_the_inverse(data: bytes, times: int) -> None:
    for name in CODECS:
        codec = byte_codec(name)
        encoded = codec.encode(data * times)
        assert encoded == codec.encode(data * times)
        assert codec.decode(encoded, len(data) * times) == data * times


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", [0, 1, 1000, 200_000])
def test_another_size_is_refused(name: str, size: int) -> None:
    codec, data = byte_codec(name), bytes(range(251)) * (size // 251) + b"x" * (size % 251)
    encoded = codec.encode(data)
    for expected in {max(size - 1, 0), size + 1, 2 * size + 5, 10**9} - {size}:
        with pytest.raises(ValueError, match="decode to"):
            codec.decode(encoded, expected)


@pytest.mark.parametrize("name", COMPRESSING)
def test_damage_is_refused_or_does_not_matter(name: str) -> None:
    codec, data = byte_codec(name), b"the quick brown fox " * 500
    encoded = codec.encode(data)
    for size in (0, 1, len(encoded) // 2, len(encoded) - 1):
        with pytest.raises(ValueError):
            codec.decode(encoded[:size], len(data))
    for extra in (b"\0", b"junk", encoded):
        with pytest.raises(ValueError):
            codec.decode(encoded + extra, len(data))


@pytest.mark.parametrize("which", BOMBS)
def test_a_bomb_is_cut_off(which: str) -> None:
    payload = bomb(which)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"more than the expected|window|memory"):
            byte_codec(which.split()[0]).decode(payload, 10_000)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


def test_no_name_but_ours() -> None:
    with pytest.raises(ValueError, match='"gzip" is unknown; expected one of stored, zlib'):
        byte_codec("gzip")


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str) -> types.ModuleType:
        if name in ("zstandard", "brotli", "compression.zstd"):
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    assert set(missing_codecs()) == {"zstd", "brotli"}
    with pytest.raises(ValueError, match=r'pip install "trihybrid\[compact\]"'):
        byte_codec("zstd").encode(b"")
    with pytest.raises(ValueError, match="needs the package brotli"):
        byte_codec("brotli").decode(b"\x3b", 0)


def test_a_brotli_that_cannot_be_bounded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.SimpleNamespace(Decompressor=object)
    monkeypatch.setattr(importlib, "import_module", lambda name: old)
    with pytest.raises(ValueError, match=r"needs brotli 1\.2"):
        byte_codec("brotli").decode(b"", 0)
    with pytest.raises(ValueError, match=r"needs brotli 1\.2"):
        byte_codec("brotli").encode(b"")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the real module is used there")
def test_the_zstd_of_newer_pythons_is_called_as_it_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the interface of `compression.zstd` over `zstandard`: one window, one bound, one frame."""
    zstandard = importlib.import_module("zstandard")

    class Decompressor:
        def __init__(self, *, options: dict[str, int]) -> None:
            self.inner = zstandard.ZstdDecompressor(
                max_window_size=1 << options["window_log_max"]
            ).decompressobj()

        def decompress(self, data: bytes, max_length: int) -> bytes:
            return self.inner.decompress(data)[:max_length]

        eof = property(lambda self: self.inner.eof)
        unused_data = property(lambda self: self.inner.unused_data)

    stand_in = types.SimpleNamespace(
        compress=lambda data, level: zstandard.ZstdCompressor(level=level).compress(data),
        ZstdDecompressor=Decompressor,
        DecompressionParameter=types.SimpleNamespace(window_log_max="window_log_max"),
        ZstdError=zstandard.ZstdError,
    )
    real = importlib.import_module
    monkeypatch.setattr(sys, "version_info", (3, 14))
    monkeypatch.setattr(
        importlib, "import_module", lambda name: stand_in if name == "compression.zstd" else real(name)
    )
    codec, data = byte_codec("zstd"), b"abc" * 999
    encoded = codec.encode(data)
    assert codec.decode(encoded, len(data)) == data
    for wrong, size in (
        (encoded, 2996),
        (encoded, 2998),
        (encoded + b"x", 2997),
        (encoded[:-1], 2997),
        (b"x" * 9, 2997),
    ):
        with pytest.raises(ValueError):
            codec.decode(wrong, size)
